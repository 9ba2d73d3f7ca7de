"""Mistakes in what cluster.yaml asks of EC2: the edit, its line, the severity, a part of the sentence."""

from __future__ import annotations

from tests.cluster_edits import Mistake, first_line_with, in_type, line_in_type, replaced, without

HEADS_PROFILE = "{Name: hyperparameter-ensembles-head}"
LAUNCH_MISTAKES: dict[str, Mistake] = {
    "worker without a machine": (
        in_type("g5.spot", without("InstanceType")),
        line_in_type("g5.spot", "node_config"),
        "error",
        "g5.spot has no InstanceType",
    ),
    "head without a machine": (
        without("InstanceType: m6i"),
        line_in_type("head.cpu", "node_config"),
        "error",
        "head.cpu has no InstanceType",
    ),
    "head with an ARM processor": (
        replaced("m6i.2xlarge", "m6g.2xlarge"),
        first_line_with("m6g.2xlarge"),
        "error",
        "m6g.2xlarge has an ARM processor",
    ),
    "worker with an ARM processor": (
        in_type("g5.spot", replaced("g5.xlarge", "g5g.xlarge")),
        first_line_with("g5g.xlarge"),
        "error",
        "g5g.xlarge has an ARM processor",
    ),
    "image for ARM": (
        replaced("ami/x86_64/base", "ami/arm64/base"),
        first_line_with("arm64"),
        "error",
        "the image is for ARM, and m6i.2xlarge has an x86 processor",
    ),
    "GPU of AMD": (
        in_type("g5.spot", replaced("g5.xlarge", "g4ad.xlarge")),
        first_line_with("g4ad.xlarge"),
        "error",
        "g4ad.xlarge has no GPU of NVIDIA",
    ),
    "root device of another system": (
        replaced("DeviceName: /dev/sda1", "DeviceName: /dev/xvda"),
        first_line_with("/dev/xvda"),
        "error",
        "/dev/xvda is a second disk beside the small root",
    ),
    "small root after a large disk": (
        replaced(
            "DeviceName: /dev/sda1\n          Ebs: {VolumeSize: 150",
            "DeviceName: /dev/sdf\n          Ebs: {VolumeSize: 200}\n"
            "        - DeviceName: /dev/sda1\n          Ebs: {VolumeSize: 30",
        ),
        first_line_with("VolumeSize: 30,"),
        "error",
        "has 30 GB and fills up",
    ),
    "market left out": (
        without("MarketType"),
        line_in_type("g6.spot", "SpotOptions"),
        "error",
        "SpotOptions without MarketType",
    ),
    "one-time that is stopped": (
        replaced("InstanceInterruptionBehavior: terminate", "InstanceInterruptionBehavior: stop"),
        first_line_with("InstanceInterruptionBehavior: stop"),
        "error",
        "EC2 refuses to stop a one-time spot instance",
    ),
    "price with its currency": (
        replaced("SpotInstanceType: one-time", 'MaxPrice: "$0.40"'),
        first_line_with("$0.40"),
        "error",
        "MaxPrice $0.40 is no number",
    ),
    "profile's ARN as its name": (
        replaced(HEADS_PROFILE, "{Name: 'arn:aws:iam::123456789012:instance-profile/head'}"),
        first_line_with("instance-profile/head"),
        "error",
        "as its Name; write Arn:",
    ),
    "role for a profile": (
        replaced(HEADS_PROFILE, "{Arn: 'arn:aws:iam::123456789012:role/head'}"),
        first_line_with("role/head"),
        "error",
        "is no ARN of an instance profile",
    ),
    "group by name": (
        replaced("[sg-0123456789abcdef0]", "[default]"),
        first_line_with("[default]"),
        "error",
        "default is none of SecurityGroupIds",
    ),
    "subnet as text": (
        in_type("g5.spot", replaced("ImageId", "SubnetIds: subnet-0a1b2c3d4e5f60718\n      ImageId")),
        first_line_with("SubnetIds"),
        "error",
        "SubnetIds is subnet-0a1b2c3d4e5f60718, but Ray wants a list",
    ),
    "user of another system": (
        replaced("ssh_user: ubuntu", "ssh_user: ec2-user"),
        first_line_with("ec2-user"),
        "error",
        "ssh_user is ec2-user, but one logs in to Ubuntu's image as ubuntu",
    ),
    "gpu in small letters": (
        in_type("g5.spot", replaced("GPU: 1", "gpu: 1")),
        line_in_type("g5.spot", "gpu: 1"),
        "error",
        "gpu is a resource of your own, not what Ray calls GPU",
    ),
    "GPUs in the plural": (
        in_type("g5.spot", replaced("GPU: 1", "GPUs: 1")),
        line_in_type("g5.spot", "GPUs: 1"),
        "error",
        "write GPU",
    ),
    "cpus in the plural": (
        in_type("g5.spot", replaced("CPU: 4", "cpus: 4")),
        line_in_type("g5.spot", "cpus: 4"),
        "error",
        "cpus is a resource of your own, not what Ray calls CPU",
    ),
    "zone that no region has": (
        replaced("us-west-2b", "us-west-2z"),
        first_line_with("us-west-2z"),
        "error",
        "AWS has no zone us-west-2z",
    ),
    "on demand before spot": (
        in_type("g6.ondemand", replaced("priority: 10", "priority: 30")),
        line_in_type("g6.ondemand", "priority: 30"),
        "warning",
        "above the 20 of g6.spot",
    ),
}
