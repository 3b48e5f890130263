"""CLIP weights from every kind of source, strictly and without running anything."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import tiny_clip
import torch

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.nn.clip import (
    build_clip,
    clip_config,
    clip_config_of_openai,
    hub_answers,
    load_openai_clip,
    openai_to_huggingface,
    random_clip,
)
from counting_zoo.nn.vision import DropPath, SelfAttention, TextAttention, TextBias


def openai_state() -> dict[str, torch.Tensor]:
    return {name: tiny_clip.fill(name, shape) for name, shape in tiny_clip.clip_shapes().items()}


def test_config_gives_the_same_shapes_again() -> None:
    clip = random_clip(tiny_clip.config(patch=32, image=96, text_layers=0) | {"attn_implementation": "eager"})
    again = random_clip(clip_config(clip))
    shapes = {k: v.shape for k, v in clip.state_dict().items()}
    assert shapes == {k: v.shape for k, v in again.state_dict().items()}
    assert again.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vision_config": {}}, "text_config"),
        (tiny_clip.config() | {"attn_implementation": "somebody/kernel"}, "attn_implementation"),
    ],
)
def test_no_config_of_a_clip(config: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_clip(config)


def test_folder(tmp_path: Path) -> None:
    clip = random_clip(tiny_clip.config())
    clip.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        loaded = build_clip(source)
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in clip.state_dict().items())


def test_folder_that_lacks_a_weight_is_not_filled_with_random_ones(tmp_path: Path) -> None:
    clip = random_clip(tiny_clip.config())
    state = clip.state_dict()
    del state["text_model.encoder.layers.0.mlp.fc1.weight"]
    clip.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(WeightsError, match=r"fc1\.weight"):
        build_clip(tmp_path)


def test_missing_weights_are_said_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(WeightsError, match="openai/clip-vit-of-nobody"):
        build_clip("openai/clip-vit-of-nobody")
    assert time.monotonic() - start < 5
    for source in ("./nowhere", "just-a-word", "/no/such/folder"):
        with pytest.raises(WeightsError, match=source):
            build_clip(source)
    with pytest.raises(WeightsError):
        build_clip(tmp_path)


class Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_pickled_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    clip = random_clip(tiny_clip.config())
    clip.config.save_pretrained(tmp_path)
    torch.save({"logit_scale": Planted(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError):
        build_clip(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_openai_layout() -> None:
    state = openai_state()
    clip = load_openai_clip(state)
    converted = clip.state_dict()
    layer, prefix = "text_model.encoder.layers.1", "transformer.resblocks.1"
    for i, letter in enumerate("qkv"):
        rows = slice(64 * i, 64 * (i + 1))
        assert torch.equal(
            converted[f"{layer}.self_attn.{letter}_proj.weight"], state[f"{prefix}.attn.in_proj_weight"][rows]
        )
        assert torch.equal(
            converted[f"{layer}.self_attn.{letter}_proj.bias"], state[f"{prefix}.attn.in_proj_bias"][rows]
        )
    assert torch.equal(converted["text_projection.weight"], state["text_projection"].T)
    assert torch.equal(converted["visual_projection.weight"], state["visual.proj"].T)
    config = clip_config_of_openai(state)
    assert config["vision_config"]["image_size"] == 32
    assert config["vision_config"]["num_hidden_layers"] == 3
    assert config["text_config"]["max_position_embeddings"] == 12
    half = {key: value.half() for key, value in state.items()}
    assert load_openai_clip(half).logit_scale.dtype == torch.float32


def test_openai_layout_is_strict() -> None:
    state = openai_state()
    with pytest.raises(WeightsError, match=r"visual\.layer1\.weight"):
        openai_to_huggingface(state | {"visual.layer1.weight": torch.zeros(1)})
    lacking = {k: v for k, v in state.items() if k != "visual.transformer.resblocks.1.mlp.c_fc.bias"}
    with pytest.raises(WeightsError, match=r"fc1\.bias"):
        load_openai_clip(lacking)
    with pytest.raises(WeightsError, match=r"visual\.conv1\.weight"):
        load_openai_clip({"some": torch.zeros(1)})
    extras = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77), "vocab_size": torch.tensor(40)}
    load_openai_clip(state | extras)


# -- attention --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_self_attention_against_a_loop() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(16, 4).eval(), torch.randn(2, 5, 16)
    q, k, v = layer.qkv(x).split(16, -1)
    mixed = torch.zeros_like(x)
    for b in range(2):
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            for i in range(5):
                weights = torch.stack([q[b, i, part] @ k[b, j, part] / 2 for j in range(5)]).softmax(0)
                mixed[b, i, part] = sum(weights[j] * v[b, j, part] for j in range(5))
    torch.testing.assert_close(layer(x), layer.proj(mixed), rtol=0, atol=1e-6)


@torch.no_grad()
def test_text_bias_is_attention_to_a_single_key() -> None:
    torch.manual_seed(0)
    attention, bias = TextAttention(16, 4).eval(), TextBias(16).eval()
    bias.load_state_dict({k: v for k, v in attention.state_dict().items() if k.startswith(("wv", "proj"))})
    x, text = torch.randn(2, 5, 16), torch.randn(2, 1, 16)
    torch.testing.assert_close(attention(x, text), bias(text).expand(-1, 5, -1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_padding_is_not_attended_to() -> None:
    torch.manual_seed(0)
    attention, x, text = TextAttention(16, 4).eval(), torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    padded = torch.cat([text, torch.zeros(2, 4, 16)], 1)
    torch.testing.assert_close(attention(x, text), attention(x, padded), rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [0, 3, 32])
def test_heads_that_do_not_divide_the_width(heads: int) -> None:
    with pytest.raises(InputError, match=f"{heads} attention heads"):
        SelfAttention(16, heads)


def test_drop_path_keeps_the_mean_and_whole_samples() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    dropped = DropPath(0.25)(x)
    per_sample = dropped.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(DropPath(0.25).eval()(x), x)


class Server(http.server.ThreadingHTTPServer):
    """Answers every request on the loopback interface with one status, as a hub or as a proxy before it."""

    status = 200
    requests: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Keeps what was asked for."""

    server: Server

    def do_HEAD(self) -> None:
        self.server.requests.append(self.path)
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which the hub was not asked yet, and without proxies of its own."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub_answers.cache_clear()
    huggingface_hub.close_session()
    yield
    hub_answers.cache_clear()
    huggingface_hub.close_session()


@pytest.mark.parametrize(("status", "expected"), [(200, True), (302, True), (404, True), (502, False), (407, False)])
@pytest.mark.parametrize("as_proxy", [False, True])
@pytest.mark.usefixtures("online")
def test_hub_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, server: Server, status: int, expected: bool, as_proxy: bool
) -> None:
    endpoint = "http://something.invalid" if as_proxy else server.url
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    if as_proxy:
        monkeypatch.setenv("http_proxy", server.url)
    server.status = status
    assert [hub_answers(), hub_answers()] == [expected] * 2
    assert server.requests == [f"{endpoint}/" if as_proxy else "/"]


def test_hub_behind_a_proxy_of_the_environment(server: Server) -> None:
    own = {"HF_ENDPOINT": "http://something.invalid", "http_proxy": server.url, "HF_HUB_OFFLINE": "0", "no_proxy": ""}
    code = "from counting_zoo.nn.clip import hub_answers; raise SystemExit(not hub_answers())"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | own).returncode == 0
    assert server.requests == ["http://something.invalid/"]


@pytest.mark.usefixtures("online")
def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        start = time.monotonic()
        assert not hub_answers()  # closed
        silent.listen()
        assert not hub_answers(0.5)  # takes the connection and says nothing
        assert time.monotonic() - start < 3


@pytest.mark.usefixtures("online")
def test_offline_mode_asks_nothing(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub_answers()
    assert server.requests == []
