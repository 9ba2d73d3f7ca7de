"""Mistakes in cluster files elsewhere: the edit, its line, the severity, a part of the sentence."""

from __future__ import annotations

from tests.cluster_edits import (
    Mistake,
    first_key,
    first_line_with,
    in_type,
    replaced,
    top_level,
    without,
    without_block,
)

OPEN_PORT = (
    "region: us-west-2\n  security_group: {GroupName: mine, IpPermissions: [{FromPort: 8265, ToPort: 8265, "
    "IpProtocol: tcp, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}"
)
MISTAKES: dict[str, Mistake] = {
    "tab": (replaced("  type: aws", "\ttype: aws"), first_line_with("type: aws"), "error", "a tab"),
    "bracket left open": (
        replaced("us-west-2c", "us-west-2c\n  tags: [a, b"),
        first_line_with("cache_stopped_nodes: false"),
        "error",
        "not YAML",
    ),
    "alias in the wrong place": (
        in_type("g5.spot", replaced("InstanceMarketOptions: *spot", "InstanceMarketOptions: *metadata_options")),
        first_line_with("InstanceMarketOptions: *metadata_options"),
        "error",
        "HttpTokens is no setting of InstanceMarketOptions",
    ),
    "text for true or false": (
        replaced("cache_stopped_nodes: false", 'cache_stopped_nodes: "false"'),
        first_line_with("cache_stopped_nodes:"),
        "error",
        'provider.cache_stopped_nodes is the text "false", but wanted is true or false',
    ),
    "text for a number": (
        replaced("max_workers: 10", 'max_workers: "10"'),
        top_level("max_workers"),
        "error",
        'max_workers is the text "10", but wanted is a whole number',
    ),
    "key given twice": (
        replaced("auth:", "max_workers: 3\nauth:"),
        first_line_with("max_workers: 3"),
        "error",
        "max_workers is given twice, first on line",
    ),
    "unknown top-level key": (
        replaced("idle_timeout_minutes", "idle_timeout_minute"),
        top_level("idle_timeout_minute"),
        "error",
        "idle_timeout_minute is no setting of the file; did you mean idle_timeout_minutes?",
    ),
    "mount without a source": (
        replaced("~/project: .", "~/project: ./no/such/folder"),
        first_line_with("./no/such/folder"),
        "error",
        "there is no ./no/such/folder to copy",
    ),
    "mount of nothing": (
        replaced("~/project: .", "~/project:"),
        first_line_with("  ~/project:"),
        "error",
        "has no path to be copied from",
    ),
    "other Ray in the setup": (
        replaced("==2.60.0", "==2.59.1"),
        first_line_with("==2.59.1"),
        "error",
        "Ray 2.59.1 is not the 2.60.0 of constraints.txt",
    ),
    "unpinned Ray": (
        replaced("-c constraints.txt 'ray[default,tune,train]==2.60.0' -e '.[aws]'", "'ray[default,tune,train]'"),
        first_line_with("'ray[default,tune,train]'"),
        "error",
        "Ray is installed without a version",
    ),
    "project without its pins": (
        replaced("-c constraints.txt 'ray[default,tune,train]==2.60.0' -e '.[aws]'", "-e '.[aws]'"),
        first_line_with("-e '.[aws]'"),
        "error",
        "installed without its pinned versions",
    ),
    "Ray's nightly wheel": (
        replaced("'ray[default,tune,train]==2.60.0'", "https://x/ray-3.0.0.dev0-cp310-cp310-manylinux2014_x86_64.whl"),
        first_line_with("cp310"),
        "error",
        "Ray 3.0.0.dev0 is not the 2.60.0",
    ),
    "other Python": (
        replaced("--python 3.11.13", "--python 3.10.14"),
        first_line_with("3.10.14"),
        "error",
        "Python 3.10.14 is not the 3.11",
    ),
    "two patches of Python": (
        replaced("worker_setup_commands: []", "worker_setup_commands: [uv venv --clear --python 3.11.9 ~/venv]"),
        first_line_with("3.11.9"),
        "error",
        "Python 3.11.9 here, but 3.11.13 on line",
    ),
    "idle timeout below a boot": (
        replaced("idle_timeout_minutes: 20", "idle_timeout_minutes: 2"),
        top_level("idle_timeout_minutes"),
        "warning",
        "idle_timeout_minutes is 2, and a boot takes about 10",
    ),
    "port open to the world": (
        replaced("region: us-west-2", OPEN_PORT),
        first_line_with("0.0.0.0/0"),
        "error",
        "0.0.0.0/0 opens ports to the whole world",
    ),
    "dashboard open": (
        replaced("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        first_line_with("--dashboard-host=0.0.0.0"),
        "error",
        "the dashboard listens on 0.0.0.0",
    ),
    "no token asked for": (
        without("RAY_AUTH_MODE"),
        top_level("setup_commands"),
        "error",
        "whoever reaches a port runs code",
    ),
    "no token mounted": (without("  ~/.ray/auth_token"), top_level("file_mounts"), "error", "no token is mounted"),
    "access key": (
        replaced(
            "region: us-west-2", "region: us-west-2\n  aws_credentials: {aws_access_key_id: AKIAIOSFODNN7EXAMPLE}"
        ),
        first_line_with("AKIA"),
        "error",
        "this looks like an AWS access key",
    ),
    "secret key in a comment": (
        replaced("auth:", "# AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY\nauth:"),
        first_line_with("AWS_SECRET"),
        "error",
        "this looks like an AWS secret key",
    ),
    "private key": (
        replaced("auth:", "# -----BEGIN OPENSSH PRIVATE KEY-----\nauth:"),
        first_line_with("-----BEGIN"),
        "error",
        "this looks like a private key",
    ),
    "token in a command": (
        replaced("export RAY_AUTH_MODE=token", "export RAY_AUTH_MODE=token WANDB_API_KEY=0123456789abcdef"),
        first_line_with("WANDB"),
        "error",
        "this looks like a value for WANDB_API_KEY",
    ),
    "password in a command": (
        replaced("head_setup_commands: []", "head_setup_commands: [mysql --password=hunter22 < setup.sql]"),
        top_level("head_setup_commands"),
        "error",
        "this looks like a value for password",
    ),
    "head that scales nothing": (
        replaced(" --autoscaling-config=~/ray_bootstrap_config.yaml", ""),
        first_line_with("ray start --head"),
        "error",
        "no worker is ever started",
    ),
    "workers at another port": (
        replaced("$RAY_HEAD_IP:6379", "$RAY_HEAD_IP:6380"),
        first_line_with(":6380"),
        "error",
        "workers look for port 6380, the head is at 6379",
    ),
    "files limited to the shell's": (
        replaced("ulimit -n 65536 || ulimit -n $(ulimit -Hn); ", ""),
        first_line_with("- ray start --head"),
        "warning",
        "limit of open files",
    ),
    "commands as text": (
        replaced("worker_setup_commands: []", "worker_setup_commands: nvidia-smi"),
        top_level("worker_setup_commands"),
        "error",
        "worker_setup_commands is nvidia-smi, but wanted is a list",
    ),
    "command that appends again": (
        replaced("head_setup_commands: []", "head_setup_commands: [echo alias r=ray >> ~/.bashrc]"),
        top_level("head_setup_commands"),
        "warning",
        "appends again each time",
    ),
    "setup left to Ray": (without_block("setup_commands"), first_key, "error", "a nightly build of Ray"),
    "image without container_name": (
        replaced("head_node_type:", "docker: {image: 'rayproject/ray:2.60.0-py311-gpu'}\nhead_node_type:"),
        top_level("docker"),
        "error",
        "docker has an image and no container_name",
    ),
    "image of another Ray": (
        replaced("head_node_type:", "docker: {image: 'rayproject/ray:2.9.3', container_name: r}\nhead_node_type:"),
        top_level("docker"),
        "error",
        "Ray 2.9.3 is not the 2.60.0",
    ),
    "image that moves": (
        replaced("head_node_type:", "docker: {image: 'rayproject/ray:latest', container_name: r}\nhead_node_type:"),
        top_level("docker"),
        "error",
        "does not say its version of Ray",
    ),
    "zone of another region": (
        replaced("us-west-2b", "us-east-1b"),
        first_line_with("us-east-1b"),
        "error",
        "availability zone us-east-1b is not in region us-west-2",
    ),
    "region that does not exist": (
        replaced("region: us-west-2", "region: us-west-22"),
        first_line_with("us-west-22"),
        "error",
        "AWS has no region us-west-22; did you mean us-west-2?",
    ),
    "provider misspelt": (
        replaced("type: aws", "type: awss"),
        first_line_with("type: awss"),
        "error",
        "Ray has no provider awss; did you mean aws?",
    ),
    "file of another provider": (
        replaced("type: aws", "type: gcp"),
        first_line_with("type: gcp"),
        "warning",
        "provider gcp is not checked beyond",
    ),
    "history travels": (
        replaced('"**/.git/**", ', ""),
        top_level("rsync_exclude"),
        "warning",
        "rsync_exclude lacks **/.git/**",
    ),
    "second document": (
        replaced("head_setup_commands: []", "---\nhead_setup_commands: []"),
        top_level("head_setup_commands"),
        "error",
        "a cluster file is one document",
    ),
}
LOCAL_MISTAKES: dict[str, Mistake] = {
    "no head": (without("head_ip"), top_level("provider"), "error", "provider local needs head_ip"),
    "a machine twice": (
        replaced("192.0.2.12]", "192.0.2.10]"),
        first_line_with("worker_ips"),
        "error",
        "192.0.2.10 is listed twice",
    ),
    "user in an address": (
        replaced("192.0.2.12]", "ubuntu@192.0.2.12]"),
        first_line_with("ubuntu@"),
        "error",
        "ubuntu@192.0.2.12 has a user in it",
    ),
    "port in an address": (
        replaced("head_ip: 192.0.2.10", "head_ip: 192.0.2.10:2222"),
        first_line_with(":2222"),
        "error",
        "192.0.2.10:2222 has a port in it",
    ),
    "more workers than machines": (
        replaced("max_workers: 2", "max_workers: 3"),
        top_level("max_workers"),
        "error",
        "max_workers 3 is more than the 2 worker_ips",
    ),
    "machines left out": (
        lambda text: text.replace("_workers: 2", "_workers: 1"),
        top_level("max_workers"),
        "warning",
        "leaves out some of the 2 worker_ips",
    ),
    "node types": (
        replaced("auth:", "head_node_type: head\nauth:"),
        top_level("head_node_type"),
        "error",
        "head_node_type is not for provider local",
    ),
    "nobody to log in as": (without("ssh_user"), top_level("auth"), "error", "no ssh_user"),
    "results at home": (
        replaced("RESULTS_DIR=/mnt/shared/runs", "RESULTS_DIR=~/runs"),
        first_line_with("RESULTS_DIR=~"),
        "warning",
        "results go to ~/runs on each node's own disk",
    ),
    "results in a folder that is emptied": (
        replaced("RESULTS_DIR=/mnt/shared/runs", "RESULTS_DIR=/tmp/runs"),
        first_line_with("RESULTS_DIR=/tmp"),
        "error",
        "results go to /tmp/runs on each node's own disk",
    ),
    "start left to Ray": (
        without_block("head_start_ray_commands"),
        first_key,
        "warning",
        "head_start_ray_commands is missing",
    ),
    "other Ray": (replaced("==2.60.0", "==2.61.0"), first_line_with("==2.61.0"), "error", "Ray 2.61.0 is not"),
}
