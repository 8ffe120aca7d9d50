# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A compact Qwen3 in plain PyTorch: the module that is trained, evaluated and distilled from.

Parameters carry the names that ``Qwen3ForCausalLM`` of transformers uses, so the state dict is the checkpoint. The
attention itself is a function handed in by the caller, which is how the evaluation swaps dense for sparse attention.
Activations run in bfloat16 (the residual stream too), normalisation and softmax in float32, as at serving time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# attention(layer, q [B, Hq, T, D], k [B, Hkv, n, D], v [B, Hkv, n, D]) -> [B, Hq, T, D]; the queries are the last T
# positions of the context.
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class NeedleConfig:
    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100_000_000.0
    max_position_embeddings: int = 131072

    def to_hf(self, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
        """``config.json``; ``rope_theta`` is given both as transformers 5 and as earlier versions read it."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **asdict(self),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "dtype": "bfloat16",
        }

    @classmethod
    def from_hf(cls, path: Path) -> NeedleConfig:
        raw = json.loads((path / "config.json").read_text())
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    xf = x.float()
    xf = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return xf.to(x.dtype) * weight.to(x.dtype)


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [len(positions), head_dim // 2], computed in float32."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions.float()[:, None] * inverse[None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, H, D], cos and sin [N, D // 2]; rotates the first half against the second."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class SelfAttention(nn.Module):
    def __init__(self, c: NeedleConfig) -> None:
        super().__init__()
        d = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * d, c.hidden_size, bias=False)
        self.q_norm = Norm(d)
        self.k_norm = Norm(d)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Mlp(nn.Module):
    def __init__(self, c: NeedleConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)


class Layer(nn.Module):
    def __init__(self, c: NeedleConfig) -> None:
        super().__init__()
        self.eps, self.d = c.rms_norm_eps, c.head_dim
        self.input_layernorm = Norm(c.hidden_size)
        self.self_attn = SelfAttention(c)
        self.post_attention_layernorm = Norm(c.hidden_size)
        self.mlp = Mlp(c)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, C] -> q [N, Hq, D], k [N, Hkv, D] (both with RoPE), v [N, Hkv, D]."""
        return before_attention(x, cos, sin, *self.before_weights(), eps=self.eps)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [N, C], attended [N, Hq * D] -> the layer's output [N, C]."""
        return after_attention(x, attended, *self.after_weights(), eps=self.eps)

    def before_weights(self) -> tuple[Tensor, ...]:
        a = self.self_attn
        modules = (self.input_layernorm, a.q_proj, a.k_proj, a.v_proj, a.q_norm, a.k_norm)
        return tuple(m.weight for m in modules)

    def after_weights(self) -> tuple[Tensor, ...]:
        m = self.mlp
        modules = (self.self_attn.o_proj, self.post_attention_layernorm, m.gate_proj, m.up_proj, m.down_proj)
        return tuple(m.weight for m in modules)


# Functions of tensors alone, so that one compilation serves every layer.


def before_attention(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = x.shape[0], q_norm.shape[0]
    h = rms_norm(x, norm, eps)
    q, k, v = (F.linear(h, w.to(h.dtype)).view(n, -1, d) for w in (wq, wk, wv))
    return apply_rope(rms_norm(q, q_norm, eps), cos, sin), apply_rope(rms_norm(k, k_norm, eps), cos, sin), v


def after_attention(
    x: Tensor, attended: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, eps: float
) -> Tensor:
    x = x + F.linear(attended, wo.to(x.dtype))
    h = rms_norm(x, norm, eps)
    return x + F.linear(F.silu(F.linear(h, gate.to(h.dtype))) * F.linear(h, up.to(h.dtype)), down.to(h.dtype))


class Backbone(nn.Module):
    def __init__(self, c: NeedleConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([Layer(c) for _ in range(c.num_hidden_layers)])
        self.norm = Norm(c.hidden_size)


class NeedleModel(nn.Module):
    def __init__(self, config: NeedleConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)

    def initialise(self) -> None:
        """Width-scaled normal weights; what writes into the residual stream starts small."""
        depth = (2 * self.config.num_hidden_layers) ** -0.5
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = p.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= depth
                nn.init.normal_(p, std=std)

    def rope(self, start: int, end: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, end, device=device)
        return rope_tables(positions, self.config.head_dim, self.config.rope_theta, dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and the tied head: [N, C] -> [N, vocab]."""
        h = rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)
        return F.linear(h, self.model.embed_tokens.weight.to(h.dtype))

    @torch.no_grad()
    def extend(self, ids: Tensor, cache: KVCache, attention: Attention) -> Tensor:
        """Run ids [B, T] after what ``cache`` holds, which grows by T; returns the last layer's output [B, T, C]."""
        b, t = ids.shape
        start, n = cache.length, cache.length + t
        x = self.model.embed_tokens(ids.reshape(-1)).to(torch.bfloat16)
        cos, sin = (table.repeat(b, 1) for table in self.rope(start, n, ids.device, x.dtype))
        for i, layer in enumerate(cast(list[Layer], self.model.layers)):
            q, k, v = layer.before(x, cos, sin)
            cache.k[i][:, :, start:n] = k.view(b, t, -1, layer.d).transpose(1, 2)
            cache.v[i][:, :, start:n] = v.view(b, t, -1, layer.d).transpose(1, 2)
            q = q.view(b, t, -1, layer.d).transpose(1, 2)
            out = attention(i, q, cache.k[i][:, :, :n], cache.v[i][:, :, :n])
            x = layer.after(x, out.transpose(1, 2).reshape(b * t, -1))
        cache.length = n
        return x.view(b, t, -1)


class KVCache:
    """Contiguous keys and values per layer, [B, Hkv, capacity, D]."""

    def __init__(self, config: NeedleConfig, batch: int, capacity: int, device: torch.device) -> None:
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.k = [torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in layers]
        self.v = [torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in layers]
        self.length = 0


def dense_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T positions, by PyTorch's own kernels."""
    del layer
    t, n = q.shape[2], k.shape[2]
    if t == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if t == n and q.is_cuda:  # cuDNN's kernel is the fastest on recent GPUs
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if t == n:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = torch.ones(t, n, dtype=torch.bool, device=q.device).tril_(n - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


# -- checkpoint ----------------------------------------------------------------------------------------------------

MAX_SHARD_BYTES = 12_000_000


def save_model(model: NeedleModel, folder: Path, eos_token_id: int, pad_token_id: int) -> None:
    """Write ``folder`` as transformers and vLLM read it: bfloat16 shards, index, config and generation config."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, p in model.state_dict().items():
        tensor = p.detach().to("cpu", torch.bfloat16).contiguous()
        nbytes = tensor.numel() * 2
        if shards[-1] and size + nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
        total += nbytes
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", model.config.to_hf(eos_token_id, pad_token_id))
    generation = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def load_model(folder: Path, device: torch.device | str = "cpu") -> NeedleModel:
    """The stored model in bfloat16, in eval mode and frozen."""
    from safetensors.torch import load_file

    model = NeedleModel(NeedleConfig.from_hf(folder))
    tensors: dict[str, Tensor] = {}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / file)
    model.load_state_dict(tensors)
    return model.to(device=device, dtype=torch.bfloat16).eval().requires_grad_(False)
