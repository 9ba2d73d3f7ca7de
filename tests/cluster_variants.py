"""Cluster files that differ from the shipped ones and are as good: the check must find nothing new in them."""

from __future__ import annotations

import re

from tests.cluster_edits import Edit, replaced

SCALING = "--autoscaling-config=~/ray_bootstrap_config.yaml"
ASKS = "grep -q RAY_AUTH_MODE ~/.bashrc || echo 'export RAY_AUTH_MODE=token' >> ~/.bashrc"
LIMITS = 'requests: {cpu: "4", memory: 16Gi}\n'


def everywhere(old: str, new: str) -> Edit:
    return lambda text: text.replace(old, new)


VARIANTS: dict[str, Edit] = {
    "scaling after a space": replaced(SCALING, SCALING.replace("=", " ")),
    "scaling in $HOME": replaced(SCALING, SCALING.replace("~", "$HOME")),
    "scaling in a path": replaced(SCALING, SCALING.replace("~", "/home/ubuntu")),
    "head's address in braces": replaced("$RAY_HEAD_IP:6379", "${RAY_HEAD_IP}:6379"),
    "head's address in double quotes": replaced("--address=$RAY_HEAD_IP:6379", '--address="$RAY_HEAD_IP:6379"'),
    "another shell": replaced(
        "ray start --address=$RAY_HEAD_IP:6379", "bash -c 'ray start --address=$RAY_HEAD_IP:6379'"
    ),
    "ray of the environment": everywhere("- ray stop\n", "- ~/venv/bin/ray stop\n"),
    "path before ray stop": everywhere("- ray stop\n", "- export PATH=$HOME/venv/bin:$PATH; ray stop\n"),
    "all in one command": lambda text: text.replace("  - ray stop\n", "").replace("- ulimit", "- ray stop; ulimit"),
    "another port": everywhere("6379", "6400"),
    "token in quotes": replaced("'export RAY_AUTH_MODE=token'", "'export RAY_AUTH_MODE=\"token\"'"),
    "token that is looked for": replaced(
        f"  - {ASKS}\n", f"  - {ASKS}\n  - 'test \"$RAY_AUTH_MODE\" = token || echo restart'\n"
    ),
    "token for every process": replaced(ASKS, "echo RAY_AUTH_MODE=token | sudo tee /etc/environment"),
    "token on starting": lambda text: text.replace(f"  - {ASKS}\n", "").replace(
        "ray start", "RAY_AUTH_MODE=token ray start"
    ),
    "token on head and workers apart": lambda text: (
        text.replace(f"  - {ASKS}\n", "")
        .replace("head_setup_commands: []", f"head_setup_commands:\n  - {ASKS}")
        .replace("worker_setup_commands: []", f"worker_setup_commands:\n  - {ASKS}")
    ),
    "region that leads another": everywhere("us-west-2", "eu-west-1"),
    "local zone": replaced("us-west-2a,us-west-2b,us-west-2c", "us-west-2-lax-1a"),
    "image and machines for ARM": lambda text: re.sub(
        r"InstanceType: [gp]\S+", "InstanceType: g5g.metal", text.replace("x86_64", "arm64").replace("m6i", "m6g")
    ),
    "profile by its ARN": replaced(
        "{Name: hyperparameter-ensembles-head}", "{Arn: 'arn:aws:iam::123456789012:instance-profile/head'}"
    ),
    "highest price": replaced("SpotInstanceType: one-time", 'SpotInstanceType: one-time, MaxPrice: "0.45"'),
    "subnets": everywhere("      MetadataOptions:", "      SubnetIds: [subnet-0a1b2c3d]\n      MetadataOptions:"),
    "bucket with dots and folders": replaced("s3://YOUR-BUCKET/runs", "s3://team-vision.eu/experiments/2026"),
    "results at Google": replaced("s3://YOUR-BUCKET/runs", "gs://team_vision/runs"),
    "results on a mounted disk": lambda text: text.replace("s3://YOUR-BUCKET/runs", "/mnt/efs/runs").replace(
        "worker_setup_commands: []", "worker_setup_commands: [sudo mount -t nfs4 fs-1:/ /mnt/efs]"
    ),
    "project from git": lambda text: text.replace("  ~/project: .", "  ~/notes: .").replace(
        "setup_commands:\n", "setup_commands:\n  - test -e ~/project || git clone https://github.com/a/b ~/project\n", 1
    ),
    "project in $HOME": replaced("cd ~/project", "cd $HOME/project"),
    "project in a path": replaced("  ~/project: .", "  /home/ubuntu/project: ."),
    "boto3 by itself": lambda text: text.replace("-e '.[aws]'", "-e .").replace(
        "head_setup_commands: []", "head_setup_commands: ['~/venv/bin/pip install -c constraints.txt boto3']"
    ),
    "key from the environment": replaced(
        "head_setup_commands: []", "head_setup_commands: ['wandb login $(aws ssm get-parameter --name key)']"
    ),
}
LOCAL_VARIANTS: dict[str, Edit] = {
    "names of machines": everywhere("192.0.2.1", "gpu"),
    "addresses of IPv6": replaced("[192.0.2.11, 192.0.2.12]", "['fd00::11', 'fd00::12']"),
    "results in S3": replaced("/mnt/shared/runs", "s3://cats/runs"),
    "head that runs trials": replaced("--num-cpus=0 --num-gpus=0 ", ""),
}
KUBERAY_VARIANTS: dict[str, Edit] = {
    "growth in another order": replaced("""'{"CPU": 122, "GPU": 16}'""", """'{"GPU":16,"CPU":122}'"""),
    "growth in fractions": replaced("""'{"CPU": 122, "GPU": 16}'""", """'{"CPU": 122.0, "GPU": 16.0}'"""),
    "container beside Ray's": replaced(LIMITS, LIMITS + "          - {name: logs, image: 'fluent/fluent-bit:3.1.4'}\n"),
    "thousandths of a core": everywhere('cpu: "4", memory: 16Gi', "cpu: 4000m, memory: 16G"),
    "secret of Kubernetes": replaced(
        "env: [{", "env: [{name: HF_TOKEN, valueFrom: {secretKeyRef: {name: hf, key: token}}}, {"
    ),
    "secret on a volume": replaced(
        "          volumes: [", "          volumes: [{name: s, secret: {secretName: mine}}, "
    ),
    "results on a volume": lambda text: text.replace("mountPath: /dev/shm", "mountPath: /results").replace(
        "s3://YOUR-BUCKET/runs", "/results/runs"
    ),
    "setting of a newer KubeRay": replaced("  rayVersion:", "  quotaPolicy: {}\n  rayVersion:"),
    "another manifest": lambda text: text + "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\n",
}
