"""What a node_config asks of EC2: machine and image that fit, a disk, spot, a profile, a firewall, a key."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster_check.document import Document, Finding, Place
from orchestrator.cluster_check.instances import is_arm, lacks_cuda
from orchestrator.cluster_check.node_types import NodeType, once_an_alias, types_of

LEAST_DISK_GB = 150  # the image, the CUDA wheels and their cache take about 100
IMAGE = re.compile(r"^(ami-([0-9a-f]{8}|[0-9a-f]{17})|resolve:ssm:[\w./-]+(:\w+)?)$")
IDENTIFIER = {
    "SecurityGroupIds": re.compile(r"^sg-([0-9a-f]{8}|[0-9a-f]{17})$"),
    "SubnetIds": re.compile(r"^subnet-([0-9a-f]{8}|[0-9a-f]{17})$"),
}
EXAMPLES = {"SecurityGroupIds": "[sg-0f3e5d7c9b1a24680]", "SubnetIds": "[subnet-0f3e5d7c9b1a24680]"}
PROFILE_ARN = re.compile(r"^arn:[\w-]+:iam::\d{12}:instance-profile/")
ROOT_OF_UBUNTU = "/dev/sda1"


def launch_findings(document: Document) -> Iterator[Finding]:
    """All that is to be said of it beyond EC2's own model."""
    yield from once_an_alias(types_of(document), _of_one)
    yield from _images_for_arm(document)
    yield from _user(document)


def _of_one(node_type: NodeType) -> Iterator[Finding]:
    yield from _machine(node_type)
    yield from _image(node_type)
    yield from _disk(node_type)
    yield from _market(node_type)
    yield from _profile(node_type)
    yield from _firewall(node_type)
    yield from _identifiers(node_type)
    yield from _key(node_type)


def _machine(node_type: NodeType) -> Iterator[Finding]:
    """A processor that the image was built for, a GPU that CUDA runs on."""
    document, kind = node_type.document, node_type.instance_type
    place = (*node_type.config, "InstanceType")
    image = document.text_at(*node_type.config, "ImageId")
    if node_type.lacks("InstanceType"):
        yield document.error(
            node_type.config, f"{node_type.name} has no InstanceType; add one, such as InstanceType: g6.xlarge"
        )
    elif lacks_cuda(kind):
        yield document.error(place, f"{kind} has no GPU of NVIDIA, so no CUDA; take another, such as g4dn.xlarge")
    elif is_arm(kind) and "x86" in image:
        yield document.error(
            place, f"{kind} has an ARM processor, and the image is for x86; take a type without the g after its number"
        )


def _images_for_arm(document: Document) -> Iterator[Finding]:
    """Each image once, however many types have it."""
    said: set[str] = set()
    for node_type in types_of(document):
        image, kind = document.text_at(*node_type.config, "ImageId"), node_type.instance_type
        if kind and not is_arm(kind) and "arm64" in image and image not in said:
            said.add(image)
            place = (*node_type.config, "ImageId")
            yield document.error(place, f"the image is for ARM, and {kind} has an x86 processor; write x86_64")


def _image(node_type: NodeType) -> Iterator[Finding]:
    document, place = node_type.document, (*node_type.config, "ImageId")
    image = document.at(*place)
    if node_type.lacks("ImageId") or str(image).lower() == "latest_dlami":
        yield document.error(
            place,
            f"{node_type.name} has no ImageId, and Ray then takes an Ubuntu 18.04 image of 2022; give ami-... or "
            "resolve:ssm:PARAMETER",
        )
    elif isinstance(image, str) and not IMAGE.match(image):
        yield document.error(
            place, f"ImageId {image} of {node_type.name} is no image; wanted is ami-... or resolve:ssm:PARAMETER"
        )


def _disk(node_type: NodeType) -> Iterator[Finding]:
    document, place = node_type.document, (*node_type.config, "BlockDeviceMappings")
    if node_type.lacks("BlockDeviceMappings"):
        yield document.error(
            place,
            f"{node_type.name} keeps the image's small root disk, which fills up; add one of {LEAST_DISK_GB} GB, gp3",
        )
    elif document.sequence(*place):
        disk = (*place, _root_disk(document, place))
        yield from _device(node_type, disk)
        yield from _volume(node_type, (*disk, "Ebs"))


def _root_disk(document: Document, place: Place) -> int:
    """Position of the root's mapping: the one of Ubuntu's root device, else the first."""
    count = len(document.sequence(*place))
    return next((i for i in range(count) if document.at(*place, i, "DeviceName") == ROOT_OF_UBUNTU), 0)


def _device(node_type: NodeType, disk: Place) -> Iterator[Finding]:
    document = node_type.document
    device = document.at(*disk, "DeviceName")
    if isinstance(device, str) and device != ROOT_OF_UBUNTU and _is_ubuntu(node_type):
        yield document.error(
            (*disk, "DeviceName"),
            f"{device} is a second disk beside the small root of Ubuntu's image; write DeviceName: {ROOT_OF_UBUNTU}",
        )


def _is_ubuntu(node_type: NodeType) -> bool:
    return "ubuntu" in node_type.document.text_at(*node_type.config, "ImageId")


def _volume(node_type: NodeType, disk: Place) -> Iterator[Finding]:
    document = node_type.document
    size, kind = document.number(*disk, "VolumeSize"), document.at(*disk, "VolumeType")
    if size is None or size < LEAST_DISK_GB:
        given = "no size" if size is None else f"{size:g} GB"
        yield document.error(
            (*disk, "VolumeSize"),
            f"the root disk of {node_type.name} has {given} and fills up; write VolumeSize: {LEAST_DISK_GB}",
        )
    if kind != "gp3":
        yield document.warning(
            (*disk, "VolumeType"),
            f"the root disk of {node_type.name} is {kind or 'of the default type'}; write VolumeType: gp3",
        )
    if document.at(*disk, "DeleteOnTermination") is False:
        yield document.warning(
            (*disk, "DeleteOnTermination"), f"disks of {node_type.name} stay and cost when it ends; write true"
        )


def _market(node_type: NodeType) -> Iterator[Finding]:
    document, options = node_type.document, (*node_type.config, "InstanceMarketOptions")
    given = document.mapping(*options)
    if "SpotOptions" in given and "MarketType" not in given:
        yield document.error(
            (*options, "SpotOptions"), "SpotOptions without MarketType; add MarketType: spot before it"
        )
    spot = document.mapping(*options, "SpotOptions")
    if spot.get("SpotInstanceType") == "persistent":
        yield document.error(
            options, "a persistent spot request starts an instance again that Ray has replaced; write one-time"
        )
    elif (behaviour := spot.get("InstanceInterruptionBehavior")) in ("stop", "hibernate"):
        yield document.error(
            (*options, "SpotOptions", "InstanceInterruptionBehavior"),
            f"EC2 refuses to {behaviour} a one-time spot instance; write InstanceInterruptionBehavior: terminate",
        )
    price = spot.get("MaxPrice")
    if isinstance(price, str) and not re.fullmatch(r"\d*\.?\d+", price):
        yield document.error(
            (*options, "SpotOptions", "MaxPrice"), f'MaxPrice {price} is no number of USD an hour; write it as "0.40"'
        )


def _profile(node_type: NodeType) -> Iterator[Finding]:
    document, place = node_type.document, (*node_type.config, "IamInstanceProfile")
    name, arn = document.text_at(*place, "Name"), document.text_at(*place, "Arn")
    if name.startswith("arn:"):
        yield document.error(
            (*place, "Name"), f"IamInstanceProfile has the ARN {name} as its Name; write Arn: in place of Name:"
        )
    if arn and not PROFILE_ARN.match(arn):
        yield document.error(
            (*place, "Arn"),
            f"{arn} is no ARN of an instance profile; wanted is arn:aws:iam::ACCOUNT:instance-profile/NAME",
        )


def _firewall(node_type: NodeType) -> Iterator[Finding]:
    if node_type.lacks("SecurityGroupIds") and node_type.lacks("NetworkInterfaces"):
        yield node_type.document.warning(
            node_type.config,
            f"{node_type.name} has no SecurityGroupIds, and Ray then opens port 22 to the whole world; give your own",
        )


def _identifiers(node_type: NodeType) -> Iterator[Finding]:
    """Groups and subnets, which EC2 takes by identifier, not by name."""
    document = node_type.document
    for key, pattern in IDENTIFIER.items():
        if key == "SubnetIds" and document.text_at(*node_type.config, key):  # Ray's own key, so not in EC2's model
            given = document.text_at(*node_type.config, key)
            yield document.error((*node_type.config, key), f"SubnetIds is {given}, but Ray wants a list: [{given}]")
        for position, given in enumerate(document.sequence(*node_type.config, key)):
            if isinstance(given, str) and not pattern.match(given):
                yield document.error(
                    (*node_type.config, key, position),
                    f"{given} is none of {key}, which EC2 knows by identifier; write such as {EXAMPLES[key]}",
                )


def _key(node_type: NodeType) -> Iterator[Finding]:
    document = node_type.document
    if document.at("auth", "ssh_private_key") and node_type.lacks("KeyName") and node_type.lacks("UserData"):
        yield document.error(
            node_type.config,
            f"auth has an ssh_private_key, so {node_type.name} needs the KeyName that AWS knows it by; add it",
        )


def _user(document: Document) -> Iterator[Finding]:
    """Whom to log in as: an image of Ubuntu knows one."""
    user = document.text_at("auth", "ssh_user")
    types = types_of(document)
    if user and user != "ubuntu" and any(_is_ubuntu(one) and one.lacks("UserData") for one in types):
        yield document.error(
            ("auth", "ssh_user"), f"ssh_user is {user}, but one logs in to Ubuntu's image as ubuntu; write that"
        )
