"""Mistakes in cluster.kuberay.yaml: the edit, its line, the severity, a part of the sentence."""

from __future__ import annotations

from tests.cluster_edits import Mistake, first_line_with, replaced, top_level, without

KUBERAY_MISTAKES: dict[str, Mistake] = {
    "other Ray": (
        replaced('rayVersion: "2.60.0"', 'rayVersion: "2.59.0"'),
        first_line_with("rayVersion"),
        "error",
        "rayVersion is 2.59.0, but constraints.txt has 2.60.0",
    ),
    "image of another Python": (
        replaced("2.60.0-py311\n", "2.60.0-py312\n"),
        first_line_with("image: &image"),
        "error",
        "Python 3.12 is not the 3.11",
    ),
    "version of another API": (
        replaced("apiVersion: ray.io/v1", "apiVersion: rayio/v1"),
        first_line_with("apiVersion: rayio"),
        "error",
        "apiVersion is rayio/v1, of which there is no RayCluster",
    ),
    "kind missing": (without("kind: RayCluster"), first_line_with("apiVersion"), "error", "the manifest has no kind"),
    "no token": (without("authOptions:"), top_level("spec"), "error", "authOptions: {mode: token}"),
    "minimum above maximum": (
        replaced("minReplicas: 0", "minReplicas: 9"),
        first_line_with("minReplicas: 9"),
        "error",
        "minReplicas 9 is above maxReplicas 8",
    ),
    "head that runs trials": (
        replaced('{num-cpus: "0", num-gpus: "0"}', "{}"),
        first_line_with("headGroupSpec"),
        "warning",
        "the head would run trials",
    ),
    "growth that is not told": (
        without("HYPERPARAMETER_ENSEMBLES_MAX_RESOURCES"),
        first_line_with("headGroupSpec"),
        "error",
        """value: '{"CPU": 122, "GPU": 16}'} to env""",
    ),
    "growth that cannot be read": (
        replaced("""'{"CPU": 122, "GPU": 16}'""", '"{CPU: 122, GPU: 16}"'),
        first_line_with("HYPERPARAMETER_ENSEMBLES_MAX_RESOURCES"),
        "error",
        "is {CPU: 122, GPU: 16}, which is no JSON of amounts",
    ),
    "growth that is no longer so": (
        replaced("maxReplicas: 8", "maxReplicas: 4"),
        first_line_with("HYPERPARAMETER_ENSEMBLES_MAX_RESOURCES"),
        "error",
        'but the worker groups grow to {"CPU": 106, "GPU": 12}; write that',
    ),
    "start parameter that is no text": (
        replaced('num-cpus: "0"', "num-cpus: 0"),
        first_line_with("num-cpus: 0"),
        "error",
        'num-cpus of rayStartParams is 0, and Kubernetes wants text; write "0"',
    ),
    "growth as text": (
        replaced("enableInTreeAutoscaling: true", 'enableInTreeAutoscaling: "true"'),
        first_line_with("enableInTreeAutoscaling"),
        "error",
        'enableInTreeAutoscaling is "true", but wanted is true or false',
    ),
    "growth misspelt": (
        replaced("enableInTreeAutoscaling", "enableInTreeAutoScaling"),
        first_line_with("enableInTreeAutoScaling"),
        "error",
        "did you mean enableInTreeAutoscaling?",
    ),
    "groups misspelt": (
        replaced("workerGroupSpecs:", "workerGroupSpec:"),
        first_line_with("workerGroupSpec:"),
        "error",
        "workerGroupSpec is no setting of spec; did you mean workerGroupSpecs?",
    ),
    "replicas misspelt": (
        replaced("maxReplicas:", "maxReplica:"),
        first_line_with("maxReplica:"),
        "error",
        "did you mean maxReplicas?",
    ),
    "two groups of one name": (
        replaced("groupName: a100x8", "groupName: gpu"),
        lambda text: first_line_with("maxReplicas: 1")(text) - 3,
        "error",
        "groupName gpu is that of line",
    ),
    "memory in GB": (
        replaced("memory: 16Gi", "memory: 16GB"),
        first_line_with("16GB"),
        "error",
        "memory is 16GB, which is no quantity of Kubernetes",
    ),
    "secret in plain text": (
        replaced("env: [{", "env: [{name: AWS_SECRET_ACCESS_KEY, value: wJalrXUtnFEMI}, {"),
        first_line_with("AWS_SECRET_ACCESS_KEY"),
        "error",
        "AWS_SECRET_ACCESS_KEY is a secret in plain text",
    ),
    "job for another cluster": (
        replaced("ray.io/cluster: hyperparameter-ensembles", "ray.io/cluster: hyperparameter-ensemble"),
        first_line_with("ray.io/cluster"),
        "error",
        "waits for a cluster hyperparameter-ensemble, but the one here is hyperparameter-ensembles",
    ),
    "results in a pod": (
        replaced("s3://YOUR-BUCKET/runs", "/project/results/runs"),
        first_line_with("entrypoint"),
        "error",
        "results go to /project/results/runs in each pod",
    ),
}
