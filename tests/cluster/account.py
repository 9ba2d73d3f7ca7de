"""What docs/cluster.md has a user prepare once: a network, two roles, a security group, a bucket."""

from __future__ import annotations

import json

from tests.cluster.cloud import REGION, client
from tests.cluster.hosts import NETWORK

TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}
BUCKET = "laboratory-experiments"
ROLES = ("hyperparameter-ensembles-head", "hyperparameter-ensembles-worker")


def prepare() -> str:
    """Make them. Returns the security group, whose network is the test hosts'."""
    ec2, iam = client("ec2"), client("iam")
    vpc = ec2.create_vpc(CidrBlock=str(NETWORK))["Vpc"]["VpcId"]
    for zone, subnet in zip("abc", NETWORK.subnets(new_prefix=20), strict=False):
        ec2.create_subnet(VpcId=vpc, CidrBlock=str(subnet), AvailabilityZone=f"{REGION}{zone}")
    for role in ROLES:
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=json.dumps(TRUST))
        iam.create_instance_profile(InstanceProfileName=role)
        iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
    client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    group = ec2.create_security_group(GroupName="hyperparameter-ensembles", Description="all within", VpcId=vpc)
    return str(group["GroupId"])
