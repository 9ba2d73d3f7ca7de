"""Mistakes in the node types of cluster.yaml: the edit, its line, the severity, a part of the sentence."""

from __future__ import annotations

from tests.cluster_edits import (
    Mistake,
    first_key,
    first_line_with,
    in_type,
    line_in_type,
    replaced,
    top_level,
    without,
    without_block,
)

SPOT = "InstanceMarketOptions: &spot"
NODE_TYPE_MISTAKES: dict[str, Mistake] = {
    "unknown key of a node type": (
        in_type("g5.spot", replaced("max_workers", "max_worker")),
        line_in_type("g5.spot", "max_worker:"),
        "error",
        "did you mean max_workers?",
    ),
    "typo in node_config": (
        replaced(SPOT, "InstanceMarketOption: &spot"),
        first_line_with("InstanceMarketOption:"),
        "error",
        "did you mean InstanceMarketOptions?",
    ),
    "typo deep in node_config": (
        in_type("a100.spot", replaced("VolumeSize", "VolumeSzie")),
        line_in_type("a100.spot", "VolumeSzie"),
        "error",
        "VolumeSzie is no setting of Ebs in EC2's RunInstances; did you mean VolumeSize?",
    ),
    "typo in spot options": (
        replaced("InstanceInterruptionBehavior: terminate", "InstanceInterruptionBehaviour: terminate"),
        first_line_with("InstanceInterruptionBehaviour"),
        "error",
        "did you mean InstanceInterruptionBehavior?",
    ),
    "market that does not exist": (
        replaced("MarketType: spot", "MarketType: spotty"),
        first_line_with("MarketType: spotty"),
        "error",
        "spotty is no MarketType of ",
    ),
    "text where a number belongs": (
        replaced("VolumeSize: 150", "VolumeSize: 150 GB"),
        first_line_with("150 GB,"),
        "error",
        "VolumeSize is '150 GB', but EC2 wants a whole number",
    ),
    "one group where a list belongs": (
        replaced("[sg-0123456789abcdef0]", "sg-0123456789abcdef0"),
        first_line_with("&security_groups"),
        "error",
        "SecurityGroupIds is 'sg-0123456789abcdef0', but EC2 wants a list",
    ),
    "name where a profile belongs": (
        replaced("{Name: hyperparameter-ensembles-head}", "hyperparameter-ensembles-head"),
        first_line_with("IamInstanceProfile: hyper"),
        "error",
        "a mapping with some of Arn, Name",
    ),
    "SubnetId, which Ray sets": (
        in_type("g5.spot", replaced("ImageId", "SubnetId: subnet-1\n      ImageId")),
        first_line_with("SubnetId: subnet-1"),
        "warning",
        "write SubnetIds",
    ),
    "unknown instance type": (
        replaced("p4d.24xlarge", "p4d.48xlarge"),
        first_line_with("p4d.48xlarge"),
        "error",
        "p4d.48xlarge is no instance type that EC2 has",
    ),
    "GPUs the instance has not": (
        in_type("g5.spot", replaced("GPU: 1", "GPU: 4")),
        line_in_type("g5.spot", "GPU: 4"),
        "error",
        "g5.spot declares 4 GPUs, but g5.xlarge has 1",
    ),
    "GPU on a machine without": (
        in_type("g5.spot", replaced("g5.xlarge", "m5.xlarge")),
        line_in_type("g5.spot", "GPU: 1"),
        "error",
        "declares 1 GPUs, but m5.xlarge has 0",
    ),
    "more CPUs than there are": (
        in_type("g5.spot", replaced("CPU: 4", "CPU: 16")),
        line_in_type("g5.spot", "CPU: 16"),
        "error",
        "declares 16 CPUs, but g5.xlarge has 4 vCPUs",
    ),
    "fraction of a GPU declared": (
        in_type("g5.spot", replaced("GPU: 1", "GPU: 0.5")),
        line_in_type("g5.spot", "GPU: 0.5"),
        "error",
        "is 0.5, but wanted is a whole number",
    ),
    "min above max in a type": (
        in_type("g6.spot", replaced("max_workers: 8", "min_workers: 9\n    max_workers: 8")),
        first_line_with("min_workers: 9"),
        "error",
        "min_workers 9 of g6.spot is above its max_workers 8",
    ),
    "minima above the cluster's max": (
        lambda text: in_type("g5.spot", replaced("max_workers: 8", "max_workers: 8\n    min_workers: 6"))(
            in_type("g6.spot", replaced("max_workers: 8", "max_workers: 8\n    min_workers: 6"))(text)
        ),
        top_level("max_workers"),
        "error",
        "max_workers 10 is below the sum of all min_workers, 12",
    ),
    "minimum that costs when idle": (
        in_type("a100.spot", replaced("max_workers: 1", "max_workers: 1\n    min_workers: 1")),
        first_line_with("min_workers: 1"),
        "warning",
        "run and cost even when idle",
    ),
    "negative max_workers": (
        replaced("max_workers: 10", "max_workers: -1"),
        top_level("max_workers"),
        "error",
        "-1 is less than the minimum",
    ),
    "no worker may start": (
        replaced("max_workers: 10", "max_workers: 0"),
        top_level("max_workers"),
        "warning",
        "no worker can ever start",
    ),
    "max_workers missing": (without("max_workers: 10"), first_key, "warning", "Ray then takes 2"),
    "head_node_type missing": (without("head_node_type"), first_key, "error", "head_node_type is missing"),
    "head_node_type misspelt": (
        replaced("head_node_type: head.cpu", "head_node_type: head.cpus"),
        top_level("head_node_type"),
        "error",
        "head.cpus is not among available_node_types; did you mean head.cpu?",
    ),
    "node types missing": (without_block("available_node_types"), first_key, "error", "names no node type"),
    "head with workers": (
        replaced("resources: {CPU: 0}", "max_workers: 2\n    resources: {CPU: 0}"),
        first_line_with("max_workers: 2"),
        "error",
        "head.cpu is the head, of which there is one",
    ),
    "head that runs trials": (
        replaced("{CPU: 0}", "{CPU: 8}"),
        first_line_with("{CPU: 8}"),
        "warning",
        "write resources: {CPU: 0}",
    ),
    "head with GPUs": (
        replaced("m6i.2xlarge", "g5.12xlarge"),
        first_line_with("g5.12xlarge"),
        "warning",
        "the head g5.12xlarge has GPUs",
    ),
    "head on spot": (
        replaced("m6i.2xlarge", "m6i.2xlarge\n      InstanceMarketOptions: {MarketType: spot}"),
        first_line_with("{MarketType: spot}"),
        "error",
        "the head is a spot instance",
    ),
    "workers without a profile": (
        in_type("g5.spot", without("IamInstanceProfile")),
        line_in_type("g5.spot", "node_config"),
        "error",
        "g5.spot has no IamInstanceProfile, so its trials cannot write to S3",
    ),
    "head without a profile": (
        without("IamInstanceProfile: {Name: hyperparameter-ensembles-head}"),
        line_in_type("head.cpu", "node_config"),
        "error",
        "iam:PassRole",
    ),
    "image missing": (
        in_type("g5.spot", without("ImageId")),
        line_in_type("g5.spot", "node_config"),
        "error",
        "g5.spot has no ImageId",
    ),
    "image empty": (
        in_type("g5.spot", replaced("ImageId: *image", 'ImageId: ""')),
        line_in_type("g5.spot", "ImageId"),
        "error",
        "g5.spot has no ImageId",
    ),
    "image misspelt": (
        in_type("g5.spot", replaced("ImageId: *image", "ImageId: ami-12345")),
        line_in_type("g5.spot", "ImageId"),
        "error",
        "ImageId ami-12345 of g5.spot is no image",
    ),
    "two images": (
        in_type("g5.spot", replaced("ImageId: *image", "ImageId: ami-0a2b85e15b7c0ac34")),
        line_in_type("g5.spot", "ImageId"),
        "warning",
        "the image of g5.spot is not that of head.cpu",
    ),
    "small disk": (
        replaced("VolumeSize: 150", "VolumeSize: 50"),
        first_line_with("VolumeSize: 50,"),
        "error",
        "has 50 GB and fills up",
    ),
    "no disk": (
        in_type("g5.spot", without("BlockDeviceMappings")),
        line_in_type("g5.spot", "node_config"),
        "error",
        "g5.spot keeps the image's small root disk",
    ),
    "disk of another type": (
        replaced("VolumeType: gp3", "VolumeType: gp2"),
        first_line_with("gp2,"),
        "warning",
        "is gp2; write VolumeType: gp3",
    ),
    "disk that stays": (
        replaced("DeleteOnTermination: true", "DeleteOnTermination: false"),
        first_line_with("DeleteOnTermination: false"),
        "warning",
        "stay and cost when it ends",
    ),
    "spot without on-demand": (
        in_type("g6.ondemand", replaced("InstanceType", "InstanceMarketOptions: *spot\n      InstanceType")),
        line_in_type("g6.spot", SPOT),
        "warning",
        "g6.spot is spot and no on-demand type has its 1 GPUs",
    ),
    "spot that is kept": (
        replaced("cache_stopped_nodes: false", "cache_stopped_nodes: true"),
        first_line_with("cache_stopped_nodes: true"),
        "error",
        "write cache_stopped_nodes: false",
    ),
    "persistent spot request": (
        replaced("SpotInstanceType: one-time", "SpotInstanceType: persistent"),
        line_in_type("g6.spot", SPOT),
        "error",
        "write one-time",
    ),
    "Ray's own firewall": (
        in_type("g5.spot", without("SecurityGroupIds")),
        line_in_type("g5.spot", "node_config"),
        "warning",
        "opens port 22 to the whole world",
    ),
    "head without ray stop": (
        without("  - ray stop"),
        top_level("head_start_ray_commands"),
        "error",
        "head_start_ray_commands does not begin with ray stop",
    ),
    "own key without its name": (
        replaced("ssh_user: ubuntu", "ssh_user: ubuntu\n  ssh_private_key: ~/.ssh/mine.pem"),
        line_in_type("head.cpu", "node_config"),
        "error",
        "needs the KeyName",
    ),
}
