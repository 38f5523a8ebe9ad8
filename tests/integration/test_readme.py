"""Every command and every Python block of the README runs, with short settings where it is long."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cmpolicy.cli.main import main
from cmpolicy_data import ReplayBuffer, bundled_path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()

NET = ["net.down_dims=[8,16]", "net.n_groups=4", "net.time_dim=8", "encoder.dim=8"]
RUN = ["examples=16", "batch_size=8", "optim.warmup=0", "eval.episodes=0", "eval.windows=8"]
IMAGE = ["net.widths=[8]", "net.groups=4", "net.embedding=8", "eval.images=8", "eval.per_class=1"]
TRAIN = [*NET, *RUN, "log.trackers=[]", "device=cpu"]
#: What makes each README command short, by the beginning of the command; the longest match counts.
SHORT = {
    "cmpolicy train task=": TRAIN,
    "cmpolicy train task=pusht preset=": [*TRAIN, "out=outputs/my-run"],
    "cmpolicy train task=pusht preset=standard data=pusht_human "
    "data.path=pusht_cchi_v7_replay.zarr data.augment=mirror precision=bf16": [
        *TRAIN,
        "out=outputs/the-bundled",
    ],
    "cmpolicy train task=pusht preset=standard data=pusht_human "
    "data.path=pusht_cchi_v7_replay.zarr data.augment=mirror init=": TRAIN,
    "cmpolicy train resume=": ["examples=24"],
    "cmpolicy data inspect": [],
    "cmpolicy data validate": [],
    "cmpolicy data generate": ["episodes=1", "workers=1"],
    "cmpolicy data generate robomimic": ["episodes=2", "workers=1"],
    "cmpolicy data convert robomimic": [],
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
    "cmpolicy bench rollout": ["episodes=2", "workers=1"],
}
#: Tested elsewhere: by the demo's own test, as this suite, against a local server, as a process.
ELSEWHERE = ("make demo", "make test", "make help", "cmpolicy data download", "cmpolicy serve")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _commands() -> list[str]:
    lines = (line.split("  #")[0].split(" # ")[0] for b in _blocks("sh") for line in b.splitlines())
    return [line.strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stores that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    whole = ReplayBuffer.open(bundled_path("pusht"))
    few = ReplayBuffer.create(folder / "pusht_cchi_v7_replay.zarr")
    start = 0
    for end in whole.episode_ends[:3]:
        few.append_episode({key: whole[key][start:end] for key in list(whole.keys())})
        start = int(end)
    return folder


def test_commands_and_code(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the README, in one folder, since later ones use what earlier ones made."""
    monkeypatch.chdir(workplace)
    blocks = _blocks("python")
    assert len(blocks) >= 2
    for block in reversed(blocks):  # the store of the last block is used by the commands
        exec(compile(block, "README.md", "exec"), {})
    commands = _commands()
    # the run that is resumed and published is made by a command further down the same block, and
    # the one that starts from it comes after it
    commands.sort(key=lambda c: ("outputs/my-run" in c) + 2 * ("outputs/further/" in c))
    for command in commands:
        if command.startswith(ELSEWHERE):
            continue
        starts = [start for start in SHORT if command.startswith(start)]
        assert starts, f"no short form for the README's command: {command}"
        _, *words = shlex.split(command)
        status = main([*words, *SHORT[max(starts, key=len)]])
        assert status == 0, f"{command}: {capsys.readouterr().err}"


def test_make_targets() -> None:
    """The README's make commands are targets, and help lists them."""
    listed = subprocess.run(
        [shutil.which("make") or "make", "help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    targets = re.findall(r"make (\w+)", "\n".join(_blocks("sh")))
    assert {"demo", "test"} <= set(targets)
    assert all(f"make {target} " in listed for target in targets)


def test_links_and_pictures_exist() -> None:
    """Every relative link of the README leads to a file of the repository."""
    for link in re.findall(r"\]\((?!https?://|#)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
