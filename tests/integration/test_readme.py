"""Every command and Python block of the READMEs runs, with short settings where it is long."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

from cmpolicy.cli.main import main
from cmpolicy_data import ReplayBuffer, bundled_path

ROOT = Path(__file__).resolve().parents[2]
#: Each is run in a folder of its own; of eval's the last part has a test of its own.
READMES = [
    "README.md",
    "data/README.md",
    "eval/README.md",
    *(
        f"cmpolicy/{name}/README.md"
        for name in (
            "training",
            "pretrained",
            "robot",
            "serve",
            "export",
            "image",
            "bench",
            "study",
        )
    ),
]

NET = ["net.down_dims=[8,16]", "net.n_groups=4", "net.time_dim=8", "encoder.dim=8"]
RUN = ["examples=16", "batch_size=8", "optim.warmup=0", "eval.episodes=0", "eval.windows=8"]
IMAGE = ["net.widths=[8]", "net.groups=4", "net.embedding=8", "eval.images=8", "eval.per_class=1"]
TRAIN = [*NET, *RUN, "log.trackers=[]", "device=cpu"]
#: What makes each README command short, by the beginning of the command; the longest match counts.
SHORT = {
    "cmpolicy train task=": TRAIN,
    "cmpolicy train task=pusht_image": [*TRAIN, "data.path=pusht_cchi_v7_replay.zarr"],
    "cmpolicy train -m": ["task=pusht", *TRAIN],
    "cmpolicy train task=pusht preset=standard data=pusht_human "
    "data.path=pusht_cchi_v7_replay.zarr data.augment=mirror precision=bf16": [
        *TRAIN,
    ],
    "cmpolicy train task=pusht preset=standard data=pusht_human "
    "data.path=pusht_cchi_v7_replay.zarr data.augment=mirror init=": TRAIN,
    "cmpolicy train resume=": ["examples=24"],
    "cmpolicy data inspect": [],
    "cmpolicy data validate": [],
    "cmpolicy data seal": [],
    "cmpolicy data edit": [],
    "cmpolicy data convert aloha": [],
    "cmpolicy data view": [],
    "cmpolicy data view my.zarr episodes=[0,1]": ["out=outputs/episodes.rrd"],  # not a window
    "cmpolicy data generate": ["episodes=1", "workers=1"],
    "cmpolicy demo data.path=": [
        *TRAIN,
        "data.val_fraction=0",
        "episodes=1",
        "videos=1",
        "first_seed=500000",
    ],
    "cmpolicy data generate robomimic": ["episodes=2", "workers=1"],
    "cmpolicy data convert robomimic": [],
    "cmpolicy data convert lerobot": [],
    "cmpolicy data convert to-lerobot": [],
    "cmpolicy data replay robomimic": [],
    "cmpolicy image train": [*IMAGE, "examples=16", "batch_size=8", "optim.warmup=0", "device=cpu"],
    "cmpolicy image sample": ["per_class=1"],
    "cmpolicy image eval": ["nfe=[1]", "samples=40"],
    "cmpolicy eval policy=": ["seeds=500000-500001", "workers=1"],
    "cmpolicy eval policy=pusht nfe=1 sampler": ["seeds=500000", "videos=1", "workers=1"],
    "cmpolicy eval report": [],
    "cmpolicy publish": [],
    "cmpolicy bench step": [*NET, "pairs=2", "warmup=0", "batch_size=8", "threads=1"],
    "cmpolicy bench latency": ["calls=2", "nfe=[1,2]", "threads=1"],
    "cmpolicy bench latency net=": ["net=tiny", "calls=2", "threads=1", "diffusion=false"],
    "cmpolicy bench server": ["pairs=5", "clients=2", "seconds=0.3"],
    "cmpolicy bench loop": ["seconds=1"],
    "cmpolicy bench delay": ["seeds=500000", "delays_ms=[0,100]", "workers=1"],
    "cmpolicy export": [],
    "cmpolicy robot-demo": ["seconds=1"],
    "cmpolicy study objectives": [
        *TRAIN,
        "objectives=[isd]",
        "seeds=[0]",
        "nfe=[1]",
        "eval_seeds=500000",
    ],
    "cmpolicy bench rollout": ["episodes=2", "workers=1"],
}
#: Tested elsewhere: by the demo's own test, as this suite, against a local server, as a process.
ELSEWHERE = (
    "make demo",
    "make test",
    "make help",
    "cmpolicy data download",
    "cmpolicy serve",
    "cmpolicy study stability",
)


def _text(readme: str) -> str:
    return re.split(r"## (A simulator|Parts) of your own\n", (ROOT / readme).read_text())[0]


def _blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", _text(readme), flags=re.DOTALL)


def _commands(readme: str) -> list[str]:
    lines = (line.split("  #")[0] for b in _blocks(readme, "sh") for line in b.splitlines())
    return [line.split(" # ")[0].strip() for line in lines if line.strip()]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the stores and the run that the READMEs speak of."""
    whole = ReplayBuffer.open(bundled_path("pusht"))
    for name in ("pusht_cchi_v7_replay.zarr", "my.zarr"):
        few = ReplayBuffer.create(tmp_path / name)
        start = 0
        for end in whole.episode_ends[:3]:
            steps = {key: whole[key][start:end] for key in list(whole.keys())}
            few.append_episode(steps)
            start = int(end)
    (tmp_path / "aloha_task").mkdir()
    for number in range(2):
        with h5py.File(tmp_path / "aloha_task" / f"episode_{number}.hdf5", "w") as file:
            file["action"] = file["observations/qpos"] = np.ones((5, 14))
    return tmp_path


@pytest.mark.filterwarnings("ignore::cmpolicy.experiment.data_checks.DataWarning")
@pytest.mark.parametrize("readme", READMES)
def test_commands_and_code(
    readme: str,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the order of the README, in one folder, since later ones use what earlier ones made."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    commands = _commands(readme)
    blocks = _blocks(readme, "python")
    if readme == "data/README.md":
        shutil.rmtree("my.zarr")  # it is made by the first block
    if any("outputs/my-run" in command for command in commands):
        assert main(["train", "task=pusht", *TRAIN, "out=outputs/my-run"]) == 0
    for block in blocks:
        exec(compile(block, readme, "exec"), {})
    for command in commands:
        if command.startswith(ELSEWHERE):
            continue
        starts = [start for start in SHORT if command.startswith(start)]
        assert starts, f"no short form for the command: {command}"
        _, *words = shlex.split(command)
        status = main([*words, *SHORT[max(starts, key=len)]])
        assert status == 0, f"{command}: {capsys.readouterr().err}"


def test_make_targets() -> None:
    """The README's make commands are targets, and help lists them."""
    listed = subprocess.run(
        [shutil.which("make") or "make", "help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    targets = re.findall(r"make (\w+)", "\n".join(_blocks("README.md", "sh")))
    assert {"demo", "test"} <= set(targets)
    assert all(f"make {target} " in listed for target in targets)


@pytest.mark.parametrize("readme", [*READMES, "cmpolicy/image/RECIPE.md"])
def test_links_and_pictures_exist(readme: str) -> None:
    """Every relative link leads to a file of the repository."""
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", (ROOT / readme).read_text()):
        file = link.partition("#")[0]
        assert (ROOT / readme).parent.joinpath(file).exists(), link
