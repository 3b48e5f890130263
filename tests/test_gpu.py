"""On a GPU: the same numbers, training and prediction in bf16, and a report of speed and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from asking import ask
from reference_clip_count import clip_count
from test_module import Batches
from tiny_clip import NAMES, SETTINGS, counter, images, official_state, relative, tokenize, training_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from counting_zoo import CLIPCount, load, load_official, save
from counting_zoo.nn.text import word_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

VIT_B_16 = {
    "projection_dim": 512,
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "projection_dim": 512,
    },
    "text_config": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "projection_dim": 512,
    },
}


@pytest.fixture(autouse=True)
def _exact() -> Any:
    """Products in full float32, so that numbers can be compared."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def run(root: Path, **options: Any) -> L.Trainer:
    quiet = {
        "accelerator": "gpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return L.Trainer(**{**quiet, **options})


@torch.no_grad()
def test_parity_in_float32() -> None:
    state, image, prompts = official_state(), images(2, 384, 384), ["cats", "hot dogs"]
    expected = clip_count(state, image, tokenize(prompts))
    model = load_official("clip_count", state, SETTINGS, tokenizer=tokenize).cuda()
    found = model(image.cuda(), [[p] for p in prompts])
    assert relative(found.raw_density[:, 0].cpu(), expected["density"]) < 1e-5
    assert relative(found.counts[:, 0].cpu(), expected["count"]) < 1e-5


@pytest.mark.parametrize("interaction", ["hierarchical", "film"])
def test_moving_and_loading(tmp_path: Path, interaction: str) -> None:
    model, image = counter(interaction=interaction, stride=16), images(1, 40, 70)[0]
    on_cpu = model.count(image, NAMES)
    model.cuda()
    on_gpu = model.count(image, NAMES)
    assert relative(on_gpu.counts, on_cpu.counts) < 1e-4  # type: ignore[union-attr]
    path = save(model, tmp_path / "a.ckpt")  # written on the GPU, read without one
    back = load(path).count(image, NAMES)
    assert torch.equal(back.density, on_cpu.density)  # type: ignore[union-attr]
    assert relative(load(path, device="cuda").count(image, NAMES).counts, on_cpu.counts) < 1e-4  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("interaction", ["hierarchical", "film"])
def test_fit_test_predict(tmp_path: Path, precision: str, interaction: str) -> None:
    model, data = counter(interaction=interaction, tokens=False), Batches()
    trainer = run(tmp_path, precision=precision)
    trainer.fit(model, data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    (scores,) = trainer.test(model, data, verbose=False)
    assert scores["test/mae"] >= 0
    predictions = [p for batch in trainer.predict(model, data) or [] for p in batch]
    assert len(predictions) == 6
    assert {p.density.device.type for p in predictions} == {"cpu"}
    for p in predictions:
        torch.testing.assert_close(p.density.sum((1, 2)), p.counts, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mixed_precision_counts_nearly_the_same() -> None:
    model, image = counter().cuda(), images(4).cuda()
    exact = model(image, ask([["pears"]] * 4)).counts
    with torch.autocast("cuda", torch.bfloat16):
        lowered = model(image, ask([["pears"]] * 4))
    assert lowered.counts.dtype == torch.float32
    assert relative(lowered.counts.cpu(), exact.cpu()) < 0.05


# -- speed at ViT-B/16 size -------------------------------------------------------------------------------------------


def seconds(step: Callable[[], Any], repeats: int = 8) -> float:
    """Mean time of a step, after three that are not counted."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def matmul_rate(dtype: torch.dtype, n: int = 8192) -> float:
    """Floating-point operations per second of a large product on this machine."""
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b)


class Operations(TorchDispatchMode):
    """Counts floating-point operations of products, convolutions and attention, forward and backward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def operations(step: Callable[[], Any]) -> int:
    """Floating-point operations of a step."""
    with Operations() as counted:
        step()
    return counted.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_report_speed_and_memory(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = CLIPCount(VIT_B_16)
    model.set_tokenizer(word_tokenizer(NAMES, 320))
    model.cuda()
    batch: Any = training_batch([[NAMES[i % 6]] for i in range(32)], side=384)
    batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}
    batch |= {k: [t.cuda() for t in batch[k]] for k in ("points", "labels")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    lowered = torch.autocast("cuda", dtype, enabled=dtype != torch.float32)

    def infer() -> None:
        with torch.no_grad(), lowered:
            model(batch["image"], batch["queries"])

    def train() -> None:
        with lowered:
            loss = torch.stack(list(model.losses(model(batch["image"], batch["queries"]), batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rate = matmul_rate(dtype)
    lines = []
    for name, step, training in (("inference", infer, False), ("training, density stage", train, True)):
        model.train(training)
        torch.cuda.reset_peak_memory_stats()
        taken, work = seconds(step), operations(step)
        lines.append(
            f"{name}, {dtype}: {len(batch['image']) / taken:.0f} windows of 384 pixels per second, "
            f"{work / taken / 1e12:.1f} TFLOP/s = {100 * work / taken / rate:.0f} % of this machine's "
            f"{rate / 1e12:.0f} TFLOP/s matrix products, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        )
        assert taken < 60
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, batch {len(batch['image'])}", *lines, sep="\n  ")
