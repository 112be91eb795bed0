"""The AWS rig: SkyPilot launches real machines (namespaces of this computer) in an emulated AWS."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import httpx

from crosslogic.dev.state import free_port
from tests.rigs.rig import ApiServer, Processes, rig_python, until, uv_program

_ZONES = {"us-east-1": ("use1-az6", "use1-az1"), "us-west-2": ("usw2-az2", "usw2-az1")}
# Name, GPU, GPUs, processors, memory in GiB, dollars on demand and as spot.
_TYPES = (
    ("m6i.large", "", 0, 2, 8, 0.096, 0.035),
    ("g6e.xlarge", "L40S", 1, 4, 32, 1.861, 0.65),
    ("p5.48xlarge", "H100", 8, 192, 2048, 55.04, 20.1),
)
_IMAGES = ("custom-cpu-ubuntu", "custom-gpu-ubuntu", "custom-gpu-ubuntu-cuda13")
_IMAGE = "ami-03cf127a"  # One that moto knows.


class AwsRig:
    """One emulated account, and SkyPilot's API server that works in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._port = free_port()
        self._processes = Processes(folder)
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ACCESS_KEY_ID": "emulated",
            "AWS_SECRET_ACCESS_KEY": "emulated",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }
        config = "allowed_clouds: [aws]\naws:\n  remote_identity: sky-node\n"
        self.server = ApiServer(self._processes, folder / "home", config, environment)
        self._environment = environment
        self.sell()

    def start(self) -> None:
        """Start everything; returns when SkyPilot answers."""
        for name, text in _catalogs().items():
            self.server.write_catalog(name, text)
        program = str(Path(__file__).with_name("emulated_aws.py"))
        self._processes.start(
            "aws",
            [str(rig_python()), "-u", program, str(self.folder), str(self._port), uv_program()],
            {**self._environment, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        )

        def look() -> bool:
            self._processes.check("aws")
            return httpx.get(f"http://127.0.0.1:{self._port}/moto-api/", timeout=5).status_code == 200

        until("the emulated AWS answers", look)
        self.server.start()

    def stop(self) -> None:
        """End everything."""
        self._processes.stop_all()

    def sell(self) -> None:
        """Sell everything again."""
        (self.folder / "capacity.json").write_text("{}")

    def sell_out(self, instance_type: str) -> None:
        """There is none of it left, in any region, spot or not."""
        code = "InsufficientInstanceCapacity"
        places = [f"{region}/{instance_type}{market}" for region in _ZONES for market in ("", "/spot")]
        (self.folder / "capacity.json").write_text(json.dumps(dict.fromkeys(places, code)))

    def instances(self, cluster: str = "") -> list[str]:
        """Ids of the instances that cost money, of one cluster or of all."""
        found: list[str] = []
        for region in _ZONES:
            filters = {"Filter.1.Name": "instance-state-name", "Filter.1.Value.1": "running"}
            filters |= {"Filter.1.Value.2": "pending", "Filter.1.Value.3": "stopped"}
            page = ElementTree.fromstring(self._call(region, "DescribeInstances", filters))
            for item in page.iterfind(".//{*}instancesSet/{*}item"):
                tags = [tag.text or "" for tag in item.iterfind("{*}tagSet/{*}item/{*}value")]
                if not cluster or any(cluster in tag for tag in tags):
                    found.append(str(item.findtext("{*}instanceId")))
        return found

    def take(self, cluster: str) -> None:
        """The cloud takes the cluster's machine back, as it does with spot instances."""
        assert self.instances(cluster), f"{cluster} has no instance"
        self.take_all(cluster)

    def take_all(self, cluster: str = "") -> None:
        """The same for whatever there is."""
        taken = self.instances(cluster)
        for region in _ZONES:
            for instance in taken:
                self._call(region, "TerminateInstances", {"InstanceId.1": instance}, is_lenient=True)

    def _call(self, region: str, action: str, fields: dict[str, str], *, is_lenient: bool = False) -> str:
        scope = f"emulated/20260101/{region}/ec2/aws4_request"
        answer = httpx.post(
            f"http://127.0.0.1:{self._port}/",
            data={"Action": action, "Version": "2016-11-15", **fields},
            # moto believes any signature, and reads the region from it.
            headers={"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=none"},
            timeout=30,
        )
        assert is_lenient or answer.status_code == 200, answer.text
        return answer.text


def _gpu_info(gpu: str, count: int) -> str:
    """The catalog's own description of an instance's GPUs; SkyPilot lists no offer without one."""
    memory = {"SizeInMiB": 81_559}
    each = {"Name": gpu, "Manufacturer": "NVIDIA", "Count": count, "MemoryInfo": memory}
    return str({"Gpus": [each], "TotalGpuMemoryInMiB": count * 81_559})


def _catalogs() -> dict[str, str]:
    """SkyPilot's price lists of what the emulated account can rent."""
    vms = [
        "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,"
        "AvailabilityZone,Arch,LocalDiskType,NVMeSupported,LocalDiskSize,LocalDiskCount,MaximumEfaInterfaces"
    ]
    images = ["Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId"]
    for region, zones in _ZONES.items():
        for zone in zones:
            for name, gpu, count, processors, memory, on_demand, spot in _TYPES:
                info = f'"{_gpu_info(gpu, count)}"' if gpu else ""
                machine = f"{name},{gpu},{count or ''},{processors},{memory},{info}"
                vms.append(f"{machine},{on_demand},{spot},{region},{zone},x86_64,,,,,0")
        images += [f"skypilot:{image},{region},ubuntu,22.04,{_IMAGE},2026-01-01," for image in _IMAGES]
    return {
        "aws/vms.csv": "\n".join(vms) + "\n",
        "aws/images.csv": "\n".join(images) + "\n",
        "aws/instance_quota_mapping.csv": "InstanceType,OnDemandInstanceCode,SpotInstanceCode\n",
        **COMMON_CATALOGS,
    }


COMMON_CATALOGS = {
    "common/metadata.csv": "GPU,MemoryGB,Manufacturer\nH100,80,NVIDIA\nL40S,48,NVIDIA\n",
    "common/accelerators.csv": "AcceleratorName,Clouds\nH100,\"['AWS', 'Slurm']\"\nL40S,\"['AWS', 'Slurm']\"\n",
}
