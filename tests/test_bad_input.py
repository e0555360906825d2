"""What a user can get wrong: one sentence that names the thing, exit code 2, nothing written, nothing compiled."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import pytest

import ar_jax
from ar_jax import command
from ar_jax.config import UsageError, get_config
from ar_jax.data import pipeline
from ar_jax.evaluation.small import Small, write_small
from ar_jax.run import FACTS, Run, load_data, train
from ar_jax.system import from_config
from ar_jax.training import checkpoints
from ar_jax.training.program import make_program
from ar_jax.training.workdir import claim, read_config

ROOT = Path(__file__).parents[1]
DIGITS = f"--config={ROOT}/configs/digits.py:smoke"
FACT_NAMES = ("modality", "shape", "levels", "label_names")
HARMLESS = {"stage"}  # moves a constant to a device
COMPILED = "/jax/core/compile/backend_compile_duration"

# What is added to `train.py --config=configs/digits.py:smoke --workdir=NEW`, and words of the answer.
TRAIN: list[tuple[str, str]] = [
    # unknown keys, at every level
    ("--config.ordr.kind=raster", "config.ordr Did you mean 'order'"),
    ("--config.data.pth=x", "config.data.pth"),
    ("--config.tokenizer.level=4", "config.tokenizer.level Did you mean 'levels'"),
    ("--config.order.parralel=true --config.order.kind=diagonal", "config.order.parralel Did you mean 'parallel'"),
    ("--config.feed.size=1", "config.feed.size"),
    ("--config.condition.guidance_dropout=0.5", "Did you mean 'guidance_dropout_rate'"),
    ("--config.model.depth=4", "config.model.depth num_layers"),
    ("--config.model.mixer.num_head=4", "config.model.mixer.num_head Did you mean 'num_heads'"),
    ("--config.head.channels=4", "config.head.channels"),
    ("--config.objective.label_smooth=0.1", "Did you mean 'label_smoothing'"),
    ("--config.optimizer.weight_decy=0.1", "Did you mean 'weight_decay'"),
    ("--config.schedule.warmup=3", "Did you mean 'warmup_steps'"),
    ("--config.train.steps=3", "config.train.steps num_steps"),
    ("--config.checkpoint.every=3", "Did you mean 'every_steps'"),
    ("--config.eval.batchsize=3", "Did you mean 'batch_size'"),
    ("--config.sampling.temprature=3", "Did you mean 'temperature'"),
    ("--config.mesh.dta=1", "config.mesh"),
    # unknown kinds and names
    ("--config.data.kind=digit", "Did you mean 'digits'"),
    ("--config.tokenizer.kind=pixel", "Did you mean 'pixels'"),
    ("--config.order.kind=rastr", "Did you mean 'raster'"),
    ("--config.feed.kind=shft", "Did you mean 'shift'"),
    ("--config.condition.kind=clas", "Did you mean 'class'"),
    ("--config.model.kind=decodr", "Did you mean 'decoder'"),
    ("--config.model.mixer.kind=sofmax", "Did you mean 'softmax'"),
    ("--config.model.mixer.kind=3linaer:1softmax", "Did you mean 'linear'"),
    ("--config.model.norm=layr", "config.model.norm= Did you mean 'layer'"),
    ("--config.model.dtype=bfloat", "Did you mean 'bfloat16'"),
    ("--config.head.kind=categoric", "Did you mean 'categorical'"),
    ("--config.objective.kind=next", "Did you mean 'next_token'"),
    ("--config.optimizer.kind=adam", "Did you mean 'adamw'"),
    ("--config.schedule.kind=cosin", "Did you mean 'cosine'"),
    ("--config.mesh.fdsp=2", "Did you mean 'fsdp'"),
    ("--config.objective.kind=masked --config.objective.schedule=cosin", "config.objective.schedule= 'cosine'"),
    ("--config.sampling.guidance_schedule=liner", "config.sampling.guidance_schedule= 'linear'"),
    # values of a wrong type
    ("--config.train.num_steps=many", "config.train.num_steps many"),
    ("--config.optimizer.learning_rate=fast", "config.optimizer.learning_rate fast"),
    ("--config.seed=1.5", "config.seed"),
    ("--config.order=spiral", "config.order"),
    ("--config.seed.x=1", "config.seed"),
    ("--config.eval=3", "config.eval=3"),
    ("--config.order.kind=random --config.order.num_steps=few", "config.order.num_steps='few' int"),
    ("--config.order.kind=parallel_groups --config.order.regions=x", "config.order.regions='x'"),
    ("--config.model.mixer.window=wide", "config.model.mixer.window='wide'"),
    ("--config.model.mixer.qk_norm=3", "config.model.mixer.qk_norm=3 str"),
    # values out of range, and sizes that do not fit
    ("--config.seed=-1", "config.seed=-1"),
    ("--config.model.mixer.num_heads=5", "num_heads=5 embed_dim=32"),
    ("--config.model.num_layers=3 --config.model.mixer.kind=linear:softmax", "num_layers=3 multiple"),
    ("--config.model.dropout_rate=1.5", "dropout_rate=1.5"),
    ("--config.condition.guidance_dropout_rate=2.0", "guidance_dropout_rate=2"),
    ("--config.objective.label_smoothing=2.0", "label_smoothing=2"),
    ("--config.order.kind=parallel_groups --config.order.regions=3", "config.order.regions divide"),
    ("--config.order.kind=blocks --config.order.block=3", "config.order.block divide"),
    ("--config.order.kind=nearest --config.order.start=8", "config.order.start outside"),
    ("--config.order.kind=random --config.order.num_steps=65", "config.order.num_steps=65"),
    ("--config.train.batch_size=0", "batch_size=0"),
    ("--config.train.batch_size=100000", "batch_size=100000 1437"),
    ("--config.train.num_steps=0", "config.train.num_steps=0"),
    ("--config.schedule.warmup_steps=41", "config.schedule.warmup_steps=41"),
    ("--config.optimizer.learning_rate=-1", "config.optimizer.learning_rate=-1"),
    ("--config.checkpoint.every_steps=0", "config.checkpoint.every_steps=0"),
    ("--config.eval.batch_size=0", "config.eval.batch_size=0"),
    ("--config.eval.every_steps=-1", "config.eval.every_steps=-1"),
    ("--config.eval.samples=3", "config.eval.samples=3"),
    ("--config.eval.samples.num_sample=3", "config.eval.samples.num_sample Did you mean 'num_samples'"),
    ("--config.mesh.data=1000", "devices"),
    ("--config.sampling.temperature=-1", "temperature=-1"),
    ("--config.sampling.temperature=nan", "temperature=nan"),
    ("--config.sampling.top_p=2", "top_p=2"),
    ("--config.sampling.top_k=0", "top_k=0"),
    # parts that do not fit one another
    ("--config.order.kind=next_scale", "next_scale pixel_pyramid"),
    ("--config.tokenizer.kind=pixel_pyramid --config.order.kind=spiral", "spiral one grid"),
    ("--config.tokenizer.kind=pixel_pyramid --config.tokenizer.sides=[1,3]", "config.tokenizer.sides"),
    ("--config.tokenizer.kind=patches --config.tokenizer.patch_size=3", "config.tokenizer.patch_size=3"),
    ("--config.tokenizer.kind=bytes", "bytes pixels"),
    ("--config.tokenizer.kind=patches", "config.head.kind='categorical' continuous gaussian_mixture"),
    ("--config.head.kind=gaussian_mixture", "config.head.kind='gaussian_mixture' discrete categorical"),
    ("--config.feed.kind=resize", "resize next_scale"),
    ("--config.feed.kind=mask", "objective mask"),
    ("--config.objective.kind=masked --config.feed.kind=shift", "objective mask"),
    ("--config.objective.kind=masked --config.model.mixer.kind=linear", "linear mask softmax"),
    ("--config.condition.guidance_dropout_rate=0.0 --config.sampling.guidance_scale=2.0", "guidance_scale=2.0"),
    ("--config.condition.kind=none --config.sampling.guidance_scale=2.0", "guidance_scale=2.0"),
    # data
    ("--config.data.kind=npz", "config.data path"),
    ("--config.data.kind=npz --config.data.path=missing.npz", "missing.npz does not exist"),
    ("--config.data.kind=npz --config.data.path=empty.npz", "empty.npz"),
    ("--config.data.kind=npz --config.data.path=truncated.npz", "truncated.npz not a complete"),
    ("--config.data.kind=npz --config.data.path=garbage.npz", "garbage.npz not a complete"),
    ("--config.data.kind=npz --config.data.path=labels.npz", "labels.npz label -1"),
    ("--config.data.kind=text --config.data.path=empty.npz", "empty.npz is empty"),
    ("--config.data.kind=text --config.data.path=text.txt --config.data.length=4", "pixels [H, W, C]"),
    ("--config.data.kind=text --config.data.path=text.txt --config.data.length=90", "config.data.length"),
    (
        "--config.data.kind=text --config.data.path=text.txt --config.data.length=4 --config.tokenizer.kind=bytes",
        "config.condition.kind='class' labels",
    ),
    (
        "--config.data.kind=text --config.data.path=text.txt --config.data.length=4 --config.tokenizer.kind=bytes "
        "--config.condition.kind=none --config.order.kind=spiral",
        "spiral",
    ),
    # the command line itself
    ("spiral", "spiral is not a flag"),
    ("--confg.order.kind=spiral", "confg.order.kind"),
    ("--config.order.kind", "config.order.kind"),
]

# What is done to the directory WORK of an untrained run before `train.py --config=configs/digits.py:smoke --workdir=WORK`.
TRAIN_IN: dict[str, tuple[Callable[[Path], object], str]] = {
    "other config": (lambda work: edit(work / "config.json", seed=7), "config.seed=7, not 0"),
    "damaged config": (lambda work: (work / "config.json").write_text("{"), "config.json cannot be read"),
    "config of a wrong form": (lambda work: (work / "config.json").write_text("[]"), "config.json cannot be read"),
    "other data": (lambda work: edit(work / "facts.json", levels=5), "other data"),
    "damaged facts": (lambda work: (work / "facts.json").write_text("{}"), "facts.json cannot be read"),
    "a file": (lambda work: (work.rename(work.with_name("old")), work.write_text("")), "WORK Cannot write"),
}
# What is done to the directory before `eval.py --workdir=WORK`, what is added to that, and words of the answer.
EVAL: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no run": (lambda work: work.rename(work.with_name("old")), "", "config.json does not exist train.py"),
    "no facts": (lambda work: (work / "facts.json").unlink(), "", "facts.json does not exist"),
    "no checkpoint": (lambda work: (work / "checkpoints").rename(work / "c"), "", "no checkpoint train first"),
    "empty config": (lambda work: (work / "config.json").write_text("{}"), "", "config.seed is missing"),
    "damaged config": (lambda work: (work / "config.json").write_text("garbage"), "", "config.json cannot be read"),
    "config of an older library": (lambda work: edit(work / "config.json", ordr={}), "", "config.ordr 'order'"),
    "other model": (lambda work: None, "--config.model.embed_dim=64", "of another model"),
    "other data": (lambda work: None, "--config.data={'kind':'npz','path':'WORK/../good.npz'}", "other data"),
    "order that does not fit": (lambda work: None, "--config.order.kind=next_scale", "next_scale pixel_pyramid"),
    "unknown setting": (lambda work: None, "--config.sampling.temp=1", "config.sampling.temp"),
    "setting out of range": (lambda work: None, "--config.sampling.top_p=2", "top_p=2"),
    "batch size": (lambda work: None, "--config.eval.batch_size=0", "config.eval.batch_size=0"),
    "samples without features": (lambda work: None, "--config.eval.samples.num_samples=9", "eval.samples.classifier"),
    "no such features": (
        lambda work: None,
        "--config.eval.samples.num_samples=9 --config.eval.samples.features=smal",
        "config.eval.samples.features='smal' Did you mean 'small'",
    ),
    "no such reference": (
        lambda work: write_classifier(work),
        "--config.eval.samples.num_samples=9 --config.eval.samples.reference=x.npz --config.eval.samples.classifier=WORK",
        "x.npz does not exist config.eval.samples.reference",
    ),
    "config is no flag here": (lambda work: None, "--config=configs/digits.py", "config"),
}
IMAGES = np.zeros((2, 8, 8, 1), np.float32)
# Calls from Python.
CALLS: list[tuple[Callable[[Run], object], str]] = [
    (lambda run: run.sample(), "num_samples"),
    (lambda run: run.sample(num_samples=0), "num_samples=0"),
    (lambda run: run.sample([0, 1], num_samples=3), "num_samples=3 2 labels"),
    (lambda run: run.sample([10]), "labels 0 to 9"),
    (lambda run: run.sample([-1]), "labels 0 to 9"),
    (lambda run: run.sample([0.5]), "labels integers"),
    (lambda run: run.sample([[1]]), "labels one dimension"),
    (lambda run: run.sample(["one"]), "labels integers"),
    (lambda run: run.sample([]), "labels"),
    (lambda run: run.sample(num_samples=1, guidance_scale=2.0), "guidance_scale labels"),
    (lambda run: run.sample([1], guidance_scale=float("inf")), "guidance_scale=inf"),
    (lambda run: run.sample([1], guidance_scale="2"), "guidance_scale='2'"),
    (lambda run: run.sample([1], guidance_schedule="liner"), "Did you mean 'linear'"),
    (lambda run: run.sample([1], temperature=-1), "temperature=-1"),
    (lambda run: run.sample([1], temperature=[1, 2]), "temperature=[1, 2]"),
    (lambda run: run.sample([1], top_p=2), "top_p=2 at most 1"),
    (lambda run: run.sample([1], top_k=1.5), "top_k=1.5 whole"),
    (lambda run: run.sample([1], min_p=-0.1), "min_p=-0.1"),
    (lambda run: run.sample([1], temprature=1), "temprature Did you mean 'temperature'"),
    (lambda run: run.sample([1], given=np.zeros((1, 64))), "given_mask both"),
    (lambda run: run.sample([1], given=np.zeros((1, 63)), given_mask=np.ones((1, 63))), "given (1, 63) (1, 64)"),
    (lambda run: run.sample([1], given=np.full((1, 64), 17), given_mask=np.ones((1, 64))), "given 0 and 16"),
    (lambda run: run.log_prob(IMAGES[..., 0], [0, 1]), "data shape (2, 8, 8)"),
    (lambda run: run.log_prob(IMAGES[:, :7], [0, 1]), "data shape (2, 7, 8, 1)"),
    (lambda run: run.log_prob(IMAGES, [0, 10]), "labels 0 to 9"),
    (lambda run: run.log_prob(IMAGES, [0]), "1 labels"),
    (lambda run: ar_jax.load("no/such/run"), "no/such/run does not exist"),
    (lambda run: get_config("configs/digit.py"), "'configs/digit.py' does not exist"),
    (lambda run: train(get_config(ROOT / "configs/digits.py:smoke"), __file__), "Cannot write"),
]
compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, fun_name="", **_: compiled.append(fun_name) if event == COMPILED else None
)


@functools.cache
def module(name: str) -> Any:
    """train.py or eval.py, imported."""
    spec = importlib.util.spec_from_file_location(f"the_command_{name}", ROOT / f"{name}.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def write_classifier(folder: Path) -> None:
    """A classifier whose weights are zero."""
    small = Small((8, 8, 1), 10, (4,))
    shapes = jax.eval_shape(small.init, jax.random.key(0))
    write_small(folder, small, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


def edit(file: Path, **values: Any) -> None:
    """Replaces values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def tree(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below a folder, and what is in them."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@contextlib.contextmanager
def nothing_happens(folder: Path) -> Iterator[None]:
    """Asserts that nothing is compiled meanwhile, and nothing below the folder changes."""
    before, count = tree(folder), len(compiled)
    yield
    assert tree(folder) == before
    assert set(compiled[count:]) <= HARMLESS


def says(text: str, words: str) -> None:
    """Asserts that a text is one line and holds all words."""
    assert text.count("\n") == 1 and text.startswith("error: ") and text.endswith((".\n", "?\n")), text
    assert [word for word in words.split() if word not in text] == [], text


def refuses(name: str, arguments: list[str], words: str, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    """Asserts that a command refuses its arguments as it should."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    capsys.readouterr()
    with nothing_happens(folder), pytest.raises(SystemExit) as stopped:
        command.run(module(name).main, read_config if name == "eval" else None)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    says(printed.err, words)


@functools.cache
def untrained(**condition: Any) -> Run:
    """A run with fresh parameters."""
    config = get_config(ROOT / "configs/digits.py:smoke")
    config.condition = condition or config.condition
    return ar_jax.build_run(config)


@pytest.fixture(scope="module")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data files, most of them bad."""
    folder = tmp_path_factory.mktemp("data")
    images, labels = np.zeros((64, 8, 8), np.uint8), np.arange(64) % 10
    arrays = {"train_images": images, "test_images": images, "train_labels": labels, "test_labels": labels}
    np.savez(folder / "good.npz", **arrays)
    np.savez(folder / "labels.npz", **arrays | {"train_labels": labels - 1})
    (folder / "empty.npz").write_bytes(b"")
    (folder / "garbage.npz").write_bytes(bytes(range(256)))
    (folder / "truncated.npz").write_bytes((folder / "good.npz").read_bytes()[:3000])
    (folder / "text.txt").write_text("a short text " * 10)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run, with a checkpoint before its first step."""
    work = tmp_path_factory.mktemp("finished") / "WORK"
    config = get_config(ROOT / "configs/digits.py:smoke")
    with claim(work, config):
        data = load_data(config)
        system = from_config(config, data)
        (work / FACTS).write_text(json.dumps({name: getattr(data, name) for name in FACT_NAMES}))
        with contextlib.closing(checkpoints.open_manager(work / "checkpoints")) as manager:
            iterator = pipeline.train_iterator(data, 64, 0)
            checkpoints.save(manager, make_program(system, config).init(), iterator)
    return work


@pytest.mark.parametrize(("arguments", "words"), TRAIN)
def test_train_refuses(arguments, words, data_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AR_JAX_DATA", str(data_files))
    line = [DIGITS, f"--workdir={tmp_path}/new", *arguments.split()]
    refuses("train", line, words, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("case", TRAIN_IN)
def test_train_refuses_the_directory_of(case, finished, tmp_path, monkeypatch, capsys):
    work, (prepare, words) = tmp_path / "WORK", TRAIN_IN[case]
    shutil.copytree(finished, work)
    prepare(work)
    refuses("train", [DIGITS, f"--workdir={work}"], words, tmp_path, monkeypatch, capsys)


def test_train_refuses_a_directory_in_use(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "WORK")
    with filelock.FileLock(tmp_path / "WORK" / ".lock"):
        refuses("train", [DIGITS, f"--workdir={tmp_path}/WORK"], "in use", tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("case", EVAL)
def test_eval_refuses(case, finished, data_files, tmp_path, monkeypatch, capsys):
    work, (prepare, arguments, words) = tmp_path / "WORK", EVAL[case]
    shutil.copytree(finished, work)
    shutil.copy(data_files / "good.npz", tmp_path)
    prepare(work)
    line = [f"--workdir={work}", *arguments.replace("WORK", str(work)).split()]
    refuses("eval", line, words, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(("call", "words"), CALLS)
def test_a_call_refuses(call, words):
    run = untrained()
    count = len(compiled)
    with pytest.raises(UsageError) as refused:
        call(run)
    says(f"error: {refused.value}\n", words)
    assert set(compiled[count:]) <= HARMLESS


@pytest.mark.parametrize("settings", [dict(labels=[1]), dict(num_samples=1, guidance_scale=2.0)])
def test_an_unconditional_model_takes_neither_labels_nor_guidance(settings):
    with pytest.raises(UsageError, match="condition"):
        untrained(kind="none").sample(**settings)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("train", "--workdir=new", "--config"),
        ("train", "--config=configs/digits.py", "--workdir"),
        ("train", "--config=configs/digit.py --workdir=new", "'configs/digit.py' Did you mean 'digits.py'"),
        ("train", "--config=configs/digits.py:smok --workdir=new", "'smok' Did you mean 'smoke'"),
        ("train", "--config=eval.py --workdir=new", "eval.py gives no config get_config"),
        ("train", "--config=configs/digits.py --workdri=new", "workdri workdir"),
        ("eval", "", "--workdir"),
        ("eval", "--workdir=new new", "new is not a flag"),
    ],
)
def test_the_command_line_itself_may_be_wrong(name, arguments, words, tmp_path, monkeypatch, capsys):
    for file in ("configs/digits.py", "eval.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    refuses(name, arguments.split(), words, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train.py --config=configs/digits.py:smoke --workdir=WORK --config.order.kind=rastr", "'rastr' 'raster'"),
        ("eval.py --workdir=WORK", "WORK config.json does not exist"),
    ],
)
def test_a_shell_sees_one_line_and_exit_code_2(line, words, tmp_path):
    arguments = line.replace("WORK", f"{tmp_path}/WORK").split()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    says(result.stderr, words)
    assert tree(tmp_path) == {}


def test_the_count_of_compilations_counts():
    count = len(compiled)
    jax.jit(lambda x: x * 3.25)(np.float32(count))
    assert len(compiled) == count + 1


def test_help_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    command.run(module("train").main)
    assert "--workdir=DIR" in capsys.readouterr().out
