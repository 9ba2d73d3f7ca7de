"""AWS on one machine: moto's API, where every instance that it says is running is a booted test host.

python -m tests.cluster.cloud FOLDER SHARED    ends, and everything with it, when its standard input does
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

from tests.cluster.hosts import GATEWAY, NETWORK, Lab, network

ROOT = Path(__file__).parents[2]
PORT, S3_PORT = 5566, 5567
REGION = "us-west-2"
URL = f"http://{GATEWAY}:{PORT}"
CREDENTIALS = {
    "AWS_ENDPOINT_URL": URL,
    "AWS_ENDPOINT_URL_S3": f"http://{GATEWAY}:{S3_PORT}",  # the same, through a gate that a test may shut
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}
LAPTOP, LAPTOP_ADDRESS = "laptop", str(NETWORK[-6])
LOGIN = "ubuntu"  # of the image that the shipped file names
MOST_HOSTS = 6  # a runaway autoscaler must not take the machine's memory
POLL_SECONDS = 0.3
LIVE = ("pending", "running")


def client(service: str) -> Any:
    """A boto3 client of this AWS."""
    return boto3.client(
        service,
        endpoint_url=URL,
        region_name=REGION,
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    )


def instances(*states: str) -> list[dict[str, Any]]:
    """The instances that are in one of the states."""
    wanted = [{"Name": "instance-state-name", "Values": list(states)}]
    replies = client("ec2").describe_instances(Filters=wanted)["Reservations"]
    return [instance for reply in replies for instance in reply["Instances"]]


class Hypervisor:
    """Keeps the hosts of a lab those that EC2 says are running."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._up: set[str] = set()
        self._refused: set[str] = set()

    def follow(self) -> None:
        """Boot what has been launched, shut down what has been terminated."""
        live = {instance["InstanceId"]: instance for instance in instances(*LIVE)}
        for name in self._up - set(live):
            say(f"{name} is shut down")
            self._lab.shut_down(name)
            self._up.remove(name)
        for name in set(live) - self._up - self._refused:
            self._boot(live[name])

    def _boot(self, instance: dict[str, Any]) -> None:
        name, address = instance["InstanceId"], instance["PrivateIpAddress"]
        market = instance.get("InstanceLifecycle", "on demand")
        if len(self._up) == MOST_HOSTS:
            say(f"{name} is refused: {MOST_HOSTS} hosts are up")
            self._refused.add(name)
            return
        self._lab.boot(name, address, login=LOGIN, public_key=public_key(instance["KeyName"]), profile=profile())
        say(f"{name} is up at {address}: {instance['InstanceType']}, {market}")
        self._up.add(name)


def public_key(name: str) -> str:
    """What an instance finds of its key pair."""
    found = client("ec2").describe_key_pairs(KeyNames=[name], IncludePublicKey=True)["KeyPairs"]
    return str(found[0]["PublicKey"])


def profile() -> str:
    """What an instance profile is to an instance: how it reaches AWS, and as whom."""
    return "\n".join(f"export {name}={value}" for name, value in CREDENTIALS.items())


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(folder: str, shared: str) -> None:
    """Be AWS until standard input ends or a signal comes."""
    signal.signal(signal.SIGTERM, stop)
    os.environ.update(MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION="true", MOTO_EC2_ENABLE_KEYPAIR_VALIDATION="true")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    lab = Lab(Path(folder), Path(shared))
    with network():
        server = ThreadedMotoServer(ip_address=str(GATEWAY), port=PORT, verbose=False)
        server.start()
        try:
            lab.boot(LAPTOP, LAPTOP_ADDRESS, shows=[ROOT])
            hypervisor = Hypervisor(lab)
            say("ready")
            while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
                hypervisor.follow()
        except KeyboardInterrupt:
            say("stopped by a signal")
        finally:
            server.stop()
            for name in lab.names():
                lab.shut_down(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
