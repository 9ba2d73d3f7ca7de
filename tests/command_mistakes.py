"""Mistakes in the commands of cluster.yaml: the edit, its line, the severity, a part of the sentence."""

from __future__ import annotations

from tests.cluster_edits import Edit, Mistake, first_line_with, replaced, top_level, without, without_block

AUTH = "RAY_AUTH_MODE=token"
ONE_COMMAND = f"export {AUTH}"
SECRET = "0123456789abcdefghijABCDEFGHIJklmnop"


def head_setup(command: str) -> Edit:
    """The head runs one command more."""
    return replaced("head_setup_commands: []", f"head_setup_commands: [{command}]")


COMMAND_MISTAKES: dict[str, Mistake] = {
    "no Ray on the head": (
        lambda text: without_block("head_start_ray_commands")(text) + "\nhead_start_ray_commands: []\n",
        top_level("head_start_ray_commands"),
        "error",
        "head_start_ray_commands is empty",
    ),
    "no Ray on workers": (
        lambda text: without_block("worker_start_ray_commands")(text) + "\nworker_start_ray_commands: []\n",
        top_level("worker_start_ray_commands"),
        "error",
        "worker_start_ray_commands is empty",
    ),
    "head that never comes back": (
        replaced("ray start --head", "ray start --head --block"),
        first_line_with("--block"),
        "error",
        "ray start --block never returns",
    ),
    "worker that never comes back": (
        replaced("ray start --address", "ray start --block --address"),
        first_line_with("--block"),
        "error",
        "ray start --block never returns",
    ),
    "workers without the head's port": (
        replaced("$RAY_HEAD_IP:6379", "$RAY_HEAD_IP"),
        first_line_with("$RAY_HEAD_IP"),
        "error",
        "write $RAY_HEAD_IP:6379",
    ),
    "head's address in single quotes": (
        replaced("$RAY_HEAD_IP:6379", "'$RAY_HEAD_IP:6379'"),
        first_line_with("$RAY_HEAD_IP"),
        "error",
        "$RAY_HEAD_IP stands in single quotes",
    ),
    "token misspelt": (
        replaced("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=tokens"),
        first_line_with("=tokens"),
        "error",
        "RAY_AUTH_MODE is tokens, so whoever reaches a port runs code",
    ),
    "token not exported": (
        replaced("export RAY_AUTH_MODE", "RAY_AUTH_MODE"),
        first_line_with("RAY_AUTH_MODE"),
        "error",
        "RAY_AUTH_MODE is set without export",
    ),
    "token for one command": (
        replaced("grep -q RAY_AUTH_MODE ~/.bashrc || echo 'export RAY_AUTH_MODE=token' >> ~/.bashrc", ONE_COMMAND),
        first_line_with("RAY_AUTH_MODE"),
        "error",
        "RAY_AUTH_MODE is set for this command alone",
    ),
    "token for the head alone": (
        lambda text: replaced("head_setup_commands: []", f"head_setup_commands: [echo 'export {AUTH}' >> ~/.bashrc]")(
            without("RAY_AUTH_MODE")(text)
        ),
        first_line_with("RAY_AUTH_MODE"),
        "error",
        "workers ask for no token",
    ),
    "no bucket": (
        replaced("s3://YOUR-BUCKET/runs", "s3://"),
        first_line_with("RESULTS_DIR=s3://"),
        "error",
        "s3:// names no bucket",
    ),
    "one slash for two": (
        replaced("s3://YOUR-BUCKET/runs", "s3:/cats/runs"),
        first_line_with("s3:/cats"),
        "error",
        "s3:/cats/runs is no place for results",
    ),
    "bucket that none can be": (
        replaced("s3://YOUR-BUCKET/runs", "s3://my_cats/runs"),
        first_line_with("my_cats"),
        "error",
        "my_cats can be no bucket's name",
    ),
    "results on the head's disk": (
        replaced("s3://YOUR-BUCKET/runs", "~/project/results/runs"),
        first_line_with("RESULTS_DIR=~"),
        "error",
        "results go to ~/project/results/runs on each node's own disk",
    ),
    "project mounted elsewhere": (
        replaced("~/project: .", "~/code: ."),
        first_line_with("- cd ~/project"),
        "error",
        "the command goes to ~/project, to which file_mounts brings nothing",
    ),
    "project not mounted": (
        without("~/project: ."),
        first_line_with("- cd ~/project"),
        "error",
        "the command goes to ~/project, to which file_mounts brings nothing",
    ),
    "head without boto3": (
        replaced("-e '.[aws]'", "-e ."),
        first_line_with("-e ."),
        "error",
        "installed without boto3",
    ),
    "account's keys on every node": (
        replaced("  ~/project: .", "  ~/.aws: ~/.aws\n  ~/project: ."),
        first_line_with("~/.aws"),
        "error",
        "~/.aws gives every node the keys of your own account",
    ),
    "token of GitHub": (
        head_setup(f"git clone https://ghp_{SECRET}@github.com/a/b"),
        first_line_with("ghp_"),
        "error",
        "this looks like a token of GitHub",
    ),
    "newer token of GitHub": (
        head_setup(f"git clone https://github_pat_{SECRET}@github.com/a/b"),
        first_line_with("github_pat_"),
        "error",
        "this looks like a token of GitHub",
    ),
    "token of Hugging Face": (
        head_setup(f"hf auth login --token hf_{SECRET}"),
        first_line_with("hf_"),
        "error",
        "this looks like a token of Hugging Face",
    ),
    "key of Weights & Biases": (
        head_setup(f"wandb login {'0123456789' * 4}"),
        first_line_with("wandb login"),
        "error",
        "this looks like a key of Weights & Biases",
    ),
}
