from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from tiny_zoo import TinyCounter

import counting_zoo
from counting_zoo.cli import DATA_COMMANDS_HELP, main
from counting_zoo.errors import ImageError, plain_message
from counting_zoo.lightning_cli import CountingCLI

ALLOW = ["--allow_packages", "tiny_zoo"]
MODEL = ["--model", "tiny_zoo.TinyCounter"]
DATA = ["--data", "tiny_zoo.TinyImages", "--data.prompts", "target"]
TRAINER = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
    "--trainer.num_sanity_val_steps",
    "0",
]


@pytest.fixture(autouse=True)
def _inside_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of width 3 after an epoch of ``fit``."""
    folder = tmp_path_factory.mktemp("fit")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", *ALLOW, *MODEL, "--model.width", "3", *DATA, *TRAINER, "--trainer.max_epochs", "1"]) == 0
    finally:
        os.chdir(before)
    return next(folder.rglob("*.ckpt"))


def run(*words: str) -> CountingCLI:
    """What :func:`main` does, with the parsed command at hand."""
    return CountingCLI(list(words))


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["tset"]])
def test_help_and_mistakes_do_not_wait_for_torch(words: list[str]) -> None:
    said = python(
        f"import sys; from counting_zoo.cli import main; code = main({words}); "
        "print(code, [m for m in ('torch', 'lightning', 'numpy', 'jsonargparse') if m in sys.modules])"
    )
    assert said.splitlines()[-1] == f"{2 if words == ['tset'] else 0} []"
    if words == ["--version"]:
        assert said.startswith(f"counting-zoo {counting_zoo.__version__}")


def test_an_unknown_command_says_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tset"]) == 2
    assert "'test'" in capsys.readouterr().err


def test_the_traceback_of_a_worker_is_left_out() -> None:
    wrapped = (
        "Caught ImageError in DataLoader worker process 0.\nOriginal Traceback\n  x\na.ImageError: b.jpg: truncated"
    )
    assert plain_message(ImageError(wrapped)) == "b.jpg: truncated"
    assert plain_message(ImageError("plain: text")) == "plain: text"


def test_print_config_composes_files_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text("trainer: {max_epochs: 3, max_steps: 7}\nmodel: {class_path: tiny_zoo.TinyCounter}\n")
    Path("b.yaml").write_text("trainer: {max_epochs: 4}\ndata: {class_path: SyntheticScenes}\n")
    words = ["fit", *ALLOW, "--config", "a.yaml", "--config", "b.yaml", "--trainer.max_steps", "9", "--print_config"]
    assert main(words) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["trainer"]["max_epochs"], config["trainer"]["max_steps"]) == (4, 9)
    assert config["data"]["class_path"].endswith("SyntheticScenes"), "short names are enough"
    assert config["model"]["init_args"]["optimizer"] is None, "no optimizer leaks in"
    assert config["seed_everything"] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model.widht", "3"],
        ["--trainer.max_epoch", "1"],
        ["--data.n_pictures", "2"],
        ["--modle", "x"],
        ["--model.width", "three"],
        ["--config", "missing.yaml"],
    ],
)
def test_what_is_unknown_is_an_error(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *ALLOW, *MODEL, *DATA, *wrong]) == 2
    said = capsys.readouterr().err
    assert (wrong[1] if "width" in wrong[0] or "config" in wrong[0] else wrong[0].split(".")[-1]) in said


def test_fit_leaves_a_checkpoint_and_its_config(checkpoint: Path) -> None:
    saved = yaml.safe_load((checkpoint.parents[1] / "config.yaml").read_text())
    assert saved["model"]["init_args"]["width"] == 3
    content = torch.load(checkpoint, weights_only=True)
    assert content["counting_zoo"]["class"] == "tiny_zoo.TinyCounter"


def test_a_checkpoint_needs_no_model_and_the_command_line_wins(checkpoint: Path) -> None:
    arguments = [*DATA, *TRAINER, "--ckpt_path", str(checkpoint)]
    cli = run("test", *arguments)
    assert isinstance(cli.model, TinyCounter)
    assert cli.model.layers[0].out_channels == 3
    stored = cli.trainer.callback_metrics["test/mae"]
    cli = run("test", *arguments, "--model.scale", "0")
    assert cli.model.scale == 0
    assert cli.trainer.callback_metrics["test/mae"] == pytest.approx(3.0), "a scale of 0 counts nothing: mean(1..5)"
    assert stored != pytest.approx(3.0)
    Path("recipe.yaml").write_text("model: {init_args: {scale: 0}}\n")
    cli = run("test", "--config", "recipe.yaml", *arguments)
    assert cli.trainer.callback_metrics["test/mae"] == pytest.approx(3.0), "so does a file on the command line"
    with pytest.raises(RuntimeError, match=r"layers\.0\.weight"):
        run("validate", *arguments, "--model.width", "5")


def test_ckpt_path_in_a_file(checkpoint: Path) -> None:
    Path("run.yaml").write_text(f"ckpt_path: {checkpoint}\n")
    cli = run("validate", "--config", "run.yaml", *DATA, *TRAINER)
    assert cli.model.layers[0].out_channels == 3


def test_fit_resumes(checkpoint: Path) -> None:
    cli = run("fit", *DATA, *TRAINER, "--ckpt_path", str(checkpoint), "--trainer.max_epochs", "3")
    assert cli.trainer.current_epoch == 3
    assert cli.trainer.global_step == 9, "3 epochs of 5 pictures in batches of 2, of which one epoch was stored"
    assert cli.model.layers[0].out_channels == 3


def test_a_processor_without_bfloat16_instructions_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["fit", *MODEL, *DATA, *TRAINER, "--trainer.precision", "bf16-mixed", "--trainer.fast_dev_run", "true"]
    for capabilities, expected in (({"avx512_bf16": True}, "bf16-mixed"), ({"avx512_bf16": False}, "32-true")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert run(*words).trainer.precision == expected


def test_test_writes_a_table_and_a_report(checkpoint: Path) -> None:
    assert (
        main(["test", *ALLOW, *DATA, *TRAINER, "--ckpt_path", str(checkpoint), "--report.pictures", "2"]) == 0
    )  # earlier name
    folder = Path("runs/test/version_0")
    assert (folder / "test_counts.csv").read_text().splitlines()[1].startswith("test/00 ü.png,dots,1,")
    report = (folder / "report.html").read_text()
    assert "TinyCounter on TinyImages" in report
    assert report.count("data:image/jpeg") >= 2


def test_predict_writes_files_and_can_fail_on_errors(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", *ALLOW, *DATA, "--data.bad", "1", *TRAINER, "--ckpt_path", str(checkpoint)]
    assert main([*words, "--predictions.dir", "out"]) == 0
    assert len(Path("out/counts.csv").read_text().splitlines()) == 1 + 4
    assert 'predict/00 ü.png,"ImageError: predict/00 ü.png: ' in Path("out/errors.csv").read_text()
    assert main([*words, "--predictions.dir", "out", "--predictions.fail_on_error", "true"]) == 2
    assert "1 of 5" in capsys.readouterr().err
    assert len(Path("out/counts.csv").read_text().splitlines()) == 1 + 4, "everything is written all the same"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "best.ckpt"),
        ({"state_dict": {}}, "counting_zoo"),
        (threading.Thread, "refused"),
    ],
)
def test_bad_checkpoints_are_one_clear_line(
    content: object, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        torch.save(content, "best.ckpt")
    assert main(["test", *ALLOW, *DATA, "--ckpt_path=best.ckpt"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert message in said
    assert "Traceback" not in said
    monkeypatch.setenv("COUNTING_ZOO_DEBUG", "1")
    with pytest.raises(counting_zoo.errors.CheckpointError):
        main(["test", *ALLOW, *DATA, "--ckpt_path=best.ckpt"])


def test_errors_while_running_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *ALLOW, *MODEL, "--model.broken", "true", *DATA, *TRAINER, "--trainer.max_epochs", "1"]) == 2
    assert "step 0" in capsys.readouterr().err
    assert main(["fit", *ALLOW, *MODEL, *DATA, *TRAINER, "--data.batch_size", "0"]) == 2
    assert "data.batch_size" in capsys.readouterr().err


def test_the_words_of_the_process_are_left_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP starts its children with them."""
    before = ["counting-zoo", "test", *ALLOW, *DATA, *TRAINER, "--ckpt_path", str(checkpoint)]
    monkeypatch.setattr(sys, "argv", list(before))
    assert main() == 0
    assert sys.argv == before


def test_pack(capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.yaml").write_text("data: {class_path: tiny_zoo.TinyImages, init_args: {n: 2}}\n")
    assert main(["pack", *ALLOW, "--config", "data.yaml", "--out", "a.h5", "--splits", "[test]"]) == 0
    assert Path("a.h5").is_file()
    assert main(["pack", *ALLOW, "--config", "data.yaml"]) == 2
    assert "--out" in capsys.readouterr().err


def test_convert_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "clip_count", "gone.ckpt", "out.ckpt"]) == 2
    assert "gone.ckpt" in capsys.readouterr().err
    Path("list.yaml").write_text("[1, 2]")
    assert main(["convert", "clip_count", "gone.ckpt", "out.ckpt", "--config", "list.yaml"]) == 2
    assert "holds a list; expected a mapping" in capsys.readouterr().err
    assert main(["convert", *ALLOW, "clip_count", "gone.ckpt", "out.ckpt"]) == 2
    assert "gone.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(DATA_COMMANDS_HELP))
def test_the_help_names_every_option_and_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, *ALLOW, *DATA, "--print_config"]) == 0
    options = yaml.safe_load(capsys.readouterr().out)
    assert main([command, "--help"]) == 0
    # each option starts a line, and its text goes on in lines that are set in
    texts = dict(re.findall(r"^  (?:-c, )?--(\w+) ((?:.*\n)(?:   .*\n)*)", capsys.readouterr().out, re.MULTILINE))
    assert texts.keys() - {"print_config", "allow_packages", "config"} == options.keys()
    for name, default in options.items():
        if name != "data" and default is not None:
            shown = f"[{','.join(default)}]" if isinstance(default, list) else default
            assert f"(default: {shown})" in texts[name], name
