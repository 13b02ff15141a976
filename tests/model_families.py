"""Tiny configurations of the mainstream families of networks, each with inputs, for tests; and two
of full size.

`make(name)` gives the same weights and inputs every time. Dropout is off: torch on the CPU, which
judges, draws other numbers. Layers are repeated where what connects them matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

VOCABULARY = 64
Sample = tuple[nn.Module, list[torch.Tensor]]


def make(name: str) -> Sample:
    """A model, in training mode, and its inputs, on the CPU in float32."""
    torch.manual_seed(0)
    model, inputs = (FAMILIES | FULL_SIZE)[name]()
    return model.train(), inputs


def target(out: torch.Tensor) -> torch.Tensor:
    """What the model shall learn to say for its inputs: arbitrary, on the CPU. Tokens for logits
    over the vocabulary; otherwise numbers of the shape of `out`."""
    generator = torch.Generator().manual_seed(3)
    if out.dim() == 3 and out.shape[-1] == VOCABULARY:
        return torch.randint(0, VOCABULARY, out.shape[:2], generator=generator)
    return torch.randn(out.shape, generator=generator)


def loss(out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross entropy with tokens, the mean squared distance from other targets."""
    if wanted.is_floating_point():
        return F.mse_loss(out.float(), wanted)
    return F.cross_entropy(out.flatten(0, 1).float(), wanted.flatten())


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, shape)


class _Logits(nn.Module):
    """A model of transformers as a function from tensors to its logits."""

    def __init__(self, model: nn.Module, *names: str, **options: Any) -> None:
        super().__init__()
        self.model, self.names, self.options = model, names, options

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        return self.model(**named, **self.options).logits


# Transformers ------------------------------------------------------------------------------------

_DECODER = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.0,
)  # fmt: skip
_ENCODER = dict(
    hidden_size=32, num_attention_heads=4, intermediate_size=48, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip


def llama() -> Sample:
    config = transformers.LlamaConfig(num_hidden_layers=2, **_DECODER)
    model = transformers.LlamaForCausalLM(config)
    return _Logits(model, "input_ids", use_cache=False), [_tokens(2, 8)]


def mixtral() -> Sample:
    config = transformers.MixtralConfig(
        num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, **_DECODER
    )
    model = transformers.MixtralForCausalLM(config)
    return _Logits(model, "input_ids", use_cache=False), [_tokens(2, 8)]


def gpt2() -> Sample:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    return _Logits(model, "input_ids", use_cache=False), [_tokens(2, 8)]


def bert() -> Sample:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=32, **_ENCODER
    )
    seen = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    model = transformers.BertForMaskedLM(config)
    return _Logits(model, "input_ids", "attention_mask"), [_tokens(2, 8), seen]


def vit() -> Sample:
    config = transformers.ViTConfig(
        num_hidden_layers=1, image_size=16, patch_size=4, num_labels=5, **_ENCODER
    )
    model = transformers.ViTForImageClassification(config)
    return _Logits(model, "pixel_values"), [torch.randn(2, 3, 16, 16)]


def whisper() -> Sample:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=16, max_target_positions=16, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    inputs = [torch.randn(2, 8, 32), _tokens(2, 6)]
    return _Logits(model, "input_features", "decoder_input_ids", use_cache=False), inputs


def t5() -> Sample:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    inputs = [_tokens(2, 8), _tokens(2, 6)]
    return _Logits(model, "input_ids", "decoder_input_ids", use_cache=False), inputs


class _Encoder(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(width, 4, 48, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(tokens)))


def encoder() -> Sample:
    return _Encoder(), [_tokens(2, 8)]


# Recurrent networks, state space models, perceptrons ---------------------------------------------


def mamba() -> Sample:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2,
        conv_kernel=4, time_step_rank=4, use_cache=False,
    )  # fmt: skip
    model = transformers.MambaForCausalLM(config)
    return _Logits(model, "input_ids", use_cache=False), [_tokens(2, 6)]


class _Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cells = kind(8, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x)[0])


def lstm() -> Sample:
    return _Recurrent(nn.LSTM), [torch.randn(2, 5, 8)]


def gru() -> Sample:
    return _Recurrent(nn.GRU), [torch.randn(2, 5, 8)]


def mlp() -> Sample:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), [torch.randn(4, 8)]


# Convolutional networks --------------------------------------------------------------------------


def resnet() -> Sample:
    """Bottleneck blocks, one of them with a stride."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck",
        num_labels=5,
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    return _Logits(model, "pixel_values"), [torch.randn(4, 3, 32, 32)]


class _InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection (MobileNetV2)."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        wide = channels * expansion
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide),
            nn.ReLU6(), nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.residual = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet() -> Sample:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
        _InvertedResidual(8, 12, 2), _InvertedResidual(12, 12, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    return model, [torch.randn(4, 3, 16, 16)]


class _UNet(nn.Module):
    """One level down and up, with a time step, group norm, attention at the bottom, a skip."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.time = nn.Linear(width, 2 * width)
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.block = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.low_norm = nn.GroupNorm(4, 2 * width)
        self.projections = nn.Linear(2 * width, 6 * width)
        self.mixed = nn.Linear(2 * width, 2 * width)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.last_norm = nn.GroupNorm(4, 2 * width)
        self.leave = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, image: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        high = self.enter(image)
        high = high + self.block(F.silu(self.norm(high)))
        low = self.down(high) + self._embedded(step, image.dtype)[:, :, None, None]
        low = low + self._attention(self.low_norm(low))
        raised = self.up(F.interpolate(low, scale_factor=2.0, mode="nearest"))
        return self.leave(F.silu(self.last_norm(torch.cat([raised, high], 1))))

    def _embedded(self, step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        half = self.width // 2
        rates = torch.exp(torch.arange(half, device=step.device) * (-9.2 / half))
        angles = step[:, None].float() * rates[None]
        return self.time(F.silu(torch.cat([angles.sin(), angles.cos()], -1).to(dtype)))

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        rows = self.projections(x.flatten(2).transpose(1, 2))
        q, k, v = rows.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.mixed(mixed).transpose(1, 2).reshape(batch, channels, height, width)


def unet() -> Sample:
    return _UNet(), [torch.randn(2, 3, 8, 8), torch.tensor([3, 400])]


FAMILIES: dict[str, Callable[[], Sample]] = {
    made.__name__: made
    for made in (
        mlp, llama, gpt2, bert, encoder, vit, whisper, t5, mixtral, mamba, lstm, gru, resnet,
        mobilenet, unet,
    )
}  # fmt: skip


def resnet50() -> Sample:
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    return _Logits(model, "pixel_values"), [torch.randn(4, 3, 224, 224)]


def bert_base() -> Sample:
    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    seen = torch.ones(2, 128, dtype=torch.int64)
    seen[1, 100:] = 0
    tokens = torch.randint(1000, config.vocab_size, (2, 128))
    model = transformers.BertForMaskedLM(config)
    return _Logits(model, "input_ids", "attention_mask"), [tokens, seen]


FULL_SIZE: dict[str, Callable[[], Sample]] = {
    made.__name__: made for made in (resnet50, bert_base)
}
