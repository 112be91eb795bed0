"""`python3 emulated_machine.py ORDER` in fresh mount, process and host-name namespaces: a machine, until it is killed.

Its disk is this computer's with changes of its own, kept in memory; its SSH server listens on its address alone. ORDER
is a JSON object. Standard library only, because it runs on the system's Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"

_UV = f"""#!/bin/bash
export SSL_CERT_FILE=${{SSL_CERT_FILE:-{_CERTIFICATES}}}
words=(); for word in "$@"; do [ "$word" = 3.10 ] && word=/usr/bin/python3; words+=("$word"); done
exec @UV@ "${{words[@]}}"
"""
# There is no init and nothing to become here: everybody is root.
_SUDO = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do shift; done\nexec "$@"\n'
_SYSTEMCTL = "#!/bin/bash\nexit 0\n"

_SSHD = """\
Port 22
ListenAddress @ADDRESS@
HostKey /host_key
StrictModes no
PasswordAuthentication no
UsePAM no
PermitRootLogin yes
MaxStartups 100:30:200
Subsystem sftp internal-sftp
SetEnv PATH=@PATH@ SSL_CERT_FILE=@CERTIFICATES@
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def mount_disk(folder: Path) -> Path:
    """An overlay over this computer's disk, with fresh /proc, /run and /tmp."""
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "tmpfs", "tmpfs", str(folder))
    root, upper, work = folder / "root", folder / "upper", folder / "work"
    for path in (root, upper, work):
        path.mkdir()
    run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={upper},workdir={work}", str(root))
    run("mount", "-t", "proc", "proc", str(root / "proc"))
    run("mount", "--rbind", "/dev", str(root / "dev"))
    for name in ("run", "tmp", "dev/shm"):
        run("mount", "-t", "tmpfs", "tmpfs", str(root / name))
    for name in ("tmp", "dev/shm"):
        (root / name).chmod(0o1777)
    (root / "run/sshd").mkdir(parents=True)
    return root


def write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def furnish(root: Path, order: dict[str, Any], host: str) -> None:
    """What a cloud's image has: programs, the host's name, the SSH server's configuration."""
    programs = {"uv": _UV.replace("@UV@", order["uv"]), "sudo": _SUDO, "systemctl": _SYSTEMCTL}
    for name, text in programs.items():
        write(root / "usr/local/bin" / name, text, 0o755)
    sshd = _SSHD.replace("@ADDRESS@", order["address"]).replace("@PATH@", _PATH)
    write(root / "etc/ssh/machine_config", sshd.replace("@CERTIFICATES@", _CERTIFICATES))
    with (root / "etc/hosts").open("a") as hosts:
        hosts.write(f"{order['private_address']} {host}\n")


def add_user(name: str, key: str) -> None:
    run("useradd", "-o", "-u", "0", "-g", "0", "-m", "-s", "/bin/bash", name)
    run("usermod", "-p", "*", name)
    home = Path("/home") / name
    write(home / ".ssh/authorized_keys", f"{key}\n", 0o600)
    (home / ".local/bin").mkdir(parents=True)
    (home / ".local/bin/uv").symlink_to("/usr/local/bin/uv")


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    host = f"ip-{order['private_address'].replace('.', '-')}"
    run("hostname", host)
    root = mount_disk(Path(order["folder"]))
    furnish(root, order, host)
    os.chroot(root)
    os.chdir("/")
    add_user(order["user"], order["key"])
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/host_key")
    print("booted", flush=True)
    os.execve("/usr/sbin/sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/machine_config"], {"PATH": _PATH})


if __name__ == "__main__":
    main()
