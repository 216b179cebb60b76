#!/usr/bin/env python3
"""Start PostgreSQL, three nodes and HAProxy on this machine, until Ctrl+C.

    python examples/cluster/run.py

Clients connect to http://127.0.0.1:8080. A node that ends is started again after two seconds. Everything is stored in
the folder `var/cluster`.
"""

import argparse
import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

HERE = Path(__file__).resolve().parent
NODES = (1, 2, 3)


def program(name: str) -> str:
    """Where a program is: on the path, or where Debian keeps those of PostgreSQL and HAProxy."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") or (debian and str(debian[-1]))
    return found or sys.exit(f"{name} is not installed.")


class Cluster:
    """All processes, and where they listen."""

    def __init__(self, folder: Path, port: int, first: int) -> None:
        self.folder = folder.resolve()
        self.port = port
        self.ports = {number: first + number - 1 for number in NODES}
        self.data = self.folder / "postgres"
        self.log = f"postgresql:///postgres?host={self.data}&user=stagecast"
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}

    def start_database(self) -> None:
        """PostgreSQL on a Unix socket in its folder, as a user other than root."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            name = next(user.pw_name for user in pwd.getpwall() if user.pw_name in ("postgres", "nobody"))
            self.data.mkdir(exist_ok=True)
            shutil.chown(self.data, name)
            self.as_user: dict[str, Any] = {"user": name, "cwd": "/"}
        else:
            self.as_user = {}
        if not (self.data / "PG_VERSION").exists():
            self._run(program("initdb"), "-D", self.data, "-U", "stagecast", "-A", "trust", "-E", "UTF8")
        options = f"-c unix_socket_directories={self.data} -c listen_addresses="
        self._run(program("pg_ctl"), "-D", self.data, "-w", "-l", self.data / "server.log", "-o", options, "start")

    def _run(self, *command: object) -> None:
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, **self.as_user)

    def start_balancer(self) -> "subprocess.Popen[bytes]":
        """HAProxy, with the ports of this cluster in its configuration."""
        ports = {"8080": self.port, **{f"300{number}": port for number, port in self.ports.items()}}
        text = (HERE / "haproxy.cfg").read_text()
        file = self.folder / "haproxy.cfg"
        file.write_text(re.sub(r"(?<=127\.0\.0\.1:)\d+", lambda found: str(ports[found[0]]), text))
        return subprocess.Popen([program("haproxy"), "-f", str(file), "-q"])

    def start_node(self, number: int) -> None:
        """One node. All share the log and the images."""
        settings = {
            "LOG": self.log,
            "IMAGES": str(self.folder / "images"),
            "SHARED_IMAGES": "true",
            "PORT": str(self.ports[number]),
            "PUBLIC_URL": f"http://127.0.0.1:{self.port}",
            "TRUSTED_PROXIES": "127.0.0.1",
            "EDITOR": "local",
            "FACE_SWAP": "local",
        }
        variables = {name: value for name, value in os.environ.items() if not name.startswith("STAGECAST_")}
        variables |= {f"STAGECAST_{name}": value for name, value in settings.items()}
        # A session of its own: Ctrl+C ends this program, which then ends the nodes.
        self.nodes[number] = subprocess.Popen(
            [sys.executable, "-m", "api", "serve"], env=variables, cwd=self.folder, start_new_session=True
        )
        about = {"url": f"http://127.0.0.1:{self.port}", "pids": {each: node.pid for each, node in self.nodes.items()}}
        (self.folder / "cluster.json").write_text(json.dumps(about))

    def wait_until_ready(self) -> None:
        """Until all nodes are ready, and HAProxy passes requests on."""
        for port in (*self.ports.values(), self.port):
            while True:
                with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5):
                    break
                time.sleep(0.1)

    def restart_nodes(self) -> None:
        """Start the nodes again that have ended."""
        for number, node in list(self.nodes.items()):
            if node.poll() is not None:
                print(f"Node {number} has ended. It is started again in two seconds.", flush=True)
                time.sleep(2)
                self.start_node(number)

    def stop(self) -> None:
        """Stop the nodes, which release their work, and then PostgreSQL."""
        for node in self.nodes.values():
            node.send_signal(signal.SIGTERM)
        for node in self.nodes.values():
            node.wait()
        self._run(program("pg_ctl"), "-D", self.data, "-m", "fast", "stop")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("var/cluster"))
    parser.add_argument("--port", type=int, default=8080, help="of HAProxy")
    parser.add_argument("--first", type=int, default=3001, help="the first of three ports for the nodes")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    cluster = Cluster(given.folder, given.port, given.first)
    for port in (cluster.port, *cluster.ports.values()):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                sys.exit(f"Port {port} is in use.")
    program("haproxy")
    cluster.start_database()
    balancer = None
    try:
        for number in NODES:
            cluster.start_node(number)
        balancer = cluster.start_balancer()
        cluster.wait_until_ready()
        print(f"Three nodes are ready behind http://127.0.0.1:{cluster.port}. Ctrl+C ends them.", flush=True)
        while True:
            time.sleep(0.2)
            cluster.restart_nodes()
    except KeyboardInterrupt:
        pass
    finally:
        if balancer is not None:
            balancer.terminate()
            balancer.wait()
        cluster.stop()


if __name__ == "__main__":
    main()
