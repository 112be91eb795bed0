"""The Slurm rig: a cluster of our own with eight GPUs that are files, as SkyPilot finds it behind a login node."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from pathlib import Path

from crosslogic.dev.state import free_port
from tests.rigs.aws import COMMON_CATALOGS
from tests.rigs.rig import ApiServer, Processes, until, uv_program, write_program, write_uv

CLUSTER = "rig"
USER = "skynode"  # Slurm runs jobs as a user; this one is made by the rig and deleted with it.

# Name, address, processors, GPUs.
_NODES = (("h100-1", "127.0.0.11", 64, 8), ("cpu-1", "127.0.0.13", 32, 0))

_SSHD = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/ssh/host
PidFile {folder}/run/sshd.pid
AuthorizedKeysFile .ssh/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
AllowUsers {user}
MaxStartups 100:30:200
MaxSessions 100
SetEnv SLURM_CONF={folder}/etc/slurm.conf PATH={folder}/bin:/usr/local/bin:/usr/bin:/bin
Subsystem sftp internal-sftp
"""

_SLURM = """\
ClusterName=rig
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/bin/prolog
MpiDefault=none
LaunchParameters=disable_send_gids
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
InactiveLimit=0
MinJobAge=30
SwitchType=switch/none
GresTypes=gpu
"""

_SSH_CONFIG = """\
Host {cluster}
    HostName 127.0.0.1
    Port {port}
    User {user}
    IdentityFile {folder}/ssh/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


class SlurmRig:
    """One Slurm cluster, and SkyPilot's API server that works with it."""

    def __init__(self, folder: Path) -> None:
        # Jobs run as another user, who must be able to go there.
        self.folder = folder
        self._ssh_port = free_port()
        self._processes = Processes(folder)
        config = "allowed_clouds: [slurm]\nslurm:\n  provision_timeout: 20\n"
        self.server = ApiServer(self._processes, folder / "home", config, {})
        self._environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SLURM_CONF": f"{folder}/etc/slurm.conf"}

    def start(self) -> None:
        """Start everything; returns when SkyPilot answers and the cluster is idle."""
        self._make_folders()
        self._make_user()
        self._write_configuration()
        run, start = self.folder / "run", self._processes.start
        munge = ["munged", "-F", "-f", "-S", f"{run}/munge.sock", f"--key-file={self.folder}/etc/munge.key"]
        munge += [f"--pid-file={run}/munged.pid", f"--log-file={run}/munged.log", f"--seed-file={run}/munge.seed"]
        start("munged", munge, self._environment)
        until("munge answers", (run / "munge.sock").exists)
        start("slurmctld", ["slurmctld", "-D", "-i"], self._environment)
        for name, _, _, _ in _NODES:
            # A host name and a hosts file of its own make a process a machine.
            script = f"hostname {name}; mount --bind {self.folder}/etc/hosts /etc/hosts; exec slurmd -D -N {name}"
            start(f"slurmd-{name}", ["unshare", "--uts", "--mount", "bash", "-ec", script], self._environment)
        Path("/run/sshd").mkdir(exist_ok=True)
        start("sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", f"{self.folder}/etc/sshd_config"], self._environment)
        until("every node is idle", lambda: self.query("sinfo", "-h", "-N", "-t", "idle").count("\n") >= len(_NODES))
        for name, text in COMMON_CATALOGS.items():
            self.server.write_catalog(name, text)
        ssh = self.server.home / ".slurm" / "config"
        ssh.parent.mkdir(exist_ok=True)
        ssh.write_text(_SSH_CONFIG.format(cluster=CLUSTER, port=self._ssh_port, user=USER, folder=self.folder))
        self.server.start()

    def stop(self) -> None:
        """End everything."""
        self._processes.stop_all()
        # What jobs have left running is theirs alone: nobody else is this user.
        subprocess.run(["pkill", "-KILL", "-u", USER], check=False)
        subprocess.run(["userdel", USER], check=False, capture_output=True)

    def query(self, *command: str) -> str:
        """What one of Slurm's programs prints."""
        return subprocess.run(command, env=self._environment, capture_output=True, text=True).stdout

    def jobs(self) -> list[str]:
        """Names of the jobs that hold machines or wait for some."""
        return self.query("squeue", "-h", "-o", "%j").split()

    def occupy(self) -> None:
        """Somebody else takes all GPUs."""
        subprocess.run(
            ["sbatch", "-p", "h100", "--gres=gpu:H100:8", "--mem=1G", "-J", "somebody-else", "--chdir=/tmp",
             "--output=/dev/null", "--wrap", "sleep 600"],
            env=self._environment, check=True, capture_output=True,
        )  # fmt: skip
        until("the GPUs are taken", lambda: "somebody-else" in self.query("squeue", "-h", "-t", "R", "-o", "%j"))

    def free(self) -> None:
        """And gives them back."""
        self.query("scancel", "-n", "somebody-else")

    def take(self, cluster: str) -> None:
        """The administrator ends the cluster's job."""
        for name in self.jobs():
            if name.startswith(cluster):
                self.query("scancel", "-n", name)

    def _make_folders(self) -> None:
        for name in ("etc", "run", "state", "ssh", "bin", "gpus", "users", *(f"spool/{node[0]}" for node in _NODES)):
            (self.folder / name).mkdir(parents=True)
        for number in range(8):
            (self.folder / "gpus" / str(number)).touch()
        for path in (self.folder, *self.folder.parents):
            if path.is_relative_to("/tmp") and path != Path("/tmp"):
                path.chmod(path.stat().st_mode | 0o055)

    def _make_user(self) -> None:
        home = self.folder / "users" / USER
        subprocess.run(["userdel", USER], check=False, capture_output=True)
        subprocess.run(["useradd", "-M", "-d", str(home), "-s", "/bin/bash", "-p", "*", USER], check=True)
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        for name in ("host", "key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.folder}/ssh/{name}"], check=True
            )
        shutil.copy(self.folder / "ssh" / "key.pub", home / ".ssh" / "authorized_keys")
        subprocess.run(["chown", "-R", f"{USER}:", str(home)], check=True)

    def _write_configuration(self) -> None:
        etc, programs = self.folder / "etc", self.folder / "bin"
        key = etc / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        values = {"folder": self.folder, "host": socket.gethostname(), "port": free_port(), "user": USER}
        nodes = [
            f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={free_port()} CPUs={cpus} RealMemory=256000"
            + (f" Gres=gpu:H100:{gpus}" if gpus else "")
            + " State=UNKNOWN"
            for name, address, cpus, gpus in _NODES
        ]
        nodes += ["PartitionName=cpu Nodes=cpu-1 Default=YES MaxTime=1-00:00:00 State=UP"]
        nodes += ["PartitionName=h100 Nodes=h100-1 MaxTime=1-00:00:00 State=UP"]
        (etc / "slurm.conf").write_text(_SLURM.format(**values) + "\n".join(nodes) + "\n")
        (etc / "gres.conf").write_text(
            f"NodeName=h100-1 Name=gpu Type=H100 File={self.folder}/gpus/[0-7] Flags=nvidia_gpu_env\n"
        )
        (etc / "cgroup.conf").write_text("CgroupAutomount=no\n")
        (etc / "sshd_config").write_text(_SSHD.format(**values | {"port": self._ssh_port}))
        hosts = "".join(f"{address} {name}\n" for name, address, _, _ in _NODES)
        (etc / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        shutil.copy(uv_program(), programs / "uv.real")
        write_uv(programs / "uv", str(programs / "uv.real"))
        # Puts uv into each cluster's private home, as a machine's image would.
        write_program(
            programs / "prolog",
            f"""
            [ -n "$SLURM_JOB_NAME" ] || exit 0
            folder={self.folder}/users/{USER}/.sky_clusters/$SLURM_JOB_NAME/.local/bin
            [ -e $folder/uv ] || {{ mkdir -p $folder; ln -sf {programs}/uv $folder/uv; }}
            """,
        )
        os.umask(0o022)
