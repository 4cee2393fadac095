"""What `bench.py` compares: models, MoE layers and losses, each behind the same few arguments.

A contestant that is not installed raises ImportError when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from foundry import foundry_module
from torch import Tensor, nn

from dbrx_train import Dbrx, DbrxConfig, MoE
from dbrx_train.model.loss import LMHead
from dbrx_train.model.moe.router import Router
from dbrx_train.parallel import checkpoint_activations

AS_RUN = "ours"
"""As `dbrx-train train` runs it: on a CPU with the allocator that the command sets."""


# --- whole models -------------------------------------------------------------------------------------------


def our_model(config: DbrxConfig, expert_impl: str = "auto", recompute: str = "none") -> nn.Module:
    model: Dbrx = _empty(partial(Dbrx, replace(config, expert_impl=expert_impl)))
    checkpoint_activations(model, recompute)
    return model


def packed_model(config: DbrxConfig) -> nn.Module:
    """As training calls it, with documents: one a sample, so that it computes what the others do."""
    model = our_model(config)

    def add_documents(_module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = args[0]
        starts = torch.zeros(len(ids), 1, dtype=torch.int32, device=ids.device)
        return args, options | {"document_ids": torch.zeros_like(ids), "document_starts": starts}

    model.register_forward_pre_hook(add_documents, with_kwargs=True)
    return model


def _empty(make: Callable[[], Any]) -> Any:
    """A module whose weights are to be set: drawing billions of them would take longer than the contest."""
    device = torch.empty(0).device
    with torch.device("meta"):
        module = make()
    return module.to_empty(device=device)


def transformers_model(config: DbrxConfig, attention: str) -> nn.Module:
    from transformers import DbrxConfig as HfConfig
    from transformers import DbrxForCausalLM

    hf = HfConfig(**config.to_hf(), attn_implementation=attention, use_cache=False)
    hf.ffn_config.moe_jitter_eps = None
    model: nn.Module = DbrxForCausalLM(hf)
    return model


def foundry_model(config: DbrxConfig) -> nn.Module:
    """LLM Foundry's experts in transformers' decoder: Foundry's own would bring its dependencies along."""
    model = transformers_model(config, "sdpa")
    for block in model.transformer.blocks:  # type: ignore[union-attr]
        block.ffn = foundry_layer(config, returns_tuple=True)  # type: ignore[union-attr]
    return model


STEP: dict[str, Callable[[DbrxConfig], nn.Module]] = {
    "loop": partial(our_model, expert_impl="loop"),
    AS_RUN: our_model,
    "ours, as modules": our_model,
    "ours, packed": packed_model,
    "ours, norm_attn_norm": partial(our_model, recompute="norm_attn_norm"),
    "ours, full": partial(our_model, recompute="full"),
    "transformers eager": partial(transformers_model, attention="eager"),
    "transformers sdpa": partial(transformers_model, attention="sdpa"),
    "foundry torch_dmoe": foundry_model,
}


# --- MoE layers ---------------------------------------------------------------------------------------------


def our_layer(config: DbrxConfig, expert_impl: str = "auto") -> nn.Module:
    layer: nn.Module = _empty(partial(MoE, replace(config, expert_impl=expert_impl)))
    return layer


def transformers_layer(config: DbrxConfig) -> nn.Module:
    model: Any = transformers_model(replace(config, n_layers=1, vocab_size=64), "eager")
    layer: nn.Module = model.transformer.blocks[0].ffn
    return layer


def foundry_layer(config: DbrxConfig, returns_tuple: bool = False) -> nn.Module:
    module = foundry_module("models", "layers", "dmoe.py")
    layer: nn.Module = module.dMoE(
        device=torch.device("cpu"),
        hidden_size=config.d_model,
        ffn_hidden_size=config.ffn_hidden_size,
        moe_num_experts=config.num_experts,
        moe_top_k=config.top_k,
        mlp_type="glu",
        activation_fn=nn.functional.silu,
        moe_normalize_expert_weights=config.normalize_expert_weights,
        bias=False,
    )
    if returns_tuple:
        layer.register_forward_hook(lambda _module, _inputs, output: (output, None))
    return layer


def megablocks_layer(config: DbrxConfig, mlp_impl: str) -> nn.Module:
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    arguments = Arguments(
        hidden_size=config.d_model,
        ffn_hidden_size=config.ffn_hidden_size,
        bias=False,
        return_bias=False,
        activation_fn=nn.functional.silu,
        moe_num_experts=config.num_experts,
        moe_top_k=config.top_k,
        moe_normalize_expert_weights=config.normalize_expert_weights,
        moe_loss_weight=0,
        mlp_type="glu",
        mlp_impl=mlp_impl,
        fp16=False,
        bf16=True,
    )
    layer: nn.Module = dMoE(arguments)
    return layer


class ScatterMoE(nn.Module):
    """ScatterMoE's experts behind our router."""

    def __init__(self, config: DbrxConfig) -> None:
        from scattermoe.mlp import GLUMLP

        super().__init__()
        self.router = Router(config)
        self.experts = GLUMLP(config.d_model, config.ffn_hidden_size, config.num_experts, config.top_k)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router(x.view(-1, x.shape[-1]))
        y: Tensor = self.experts(x, routing.weights, routing.expert_ids)
        return y


def matrices(layer: nn.Module, of: Callable[[nn.Parameter], Any]) -> Sequence[Tensor]:
    """Of each parameter its data or gradient: v1, w1, w2, each [E, F, D] or [E * F, D], and the router's."""
    if isinstance(layer, ScatterMoE):
        experts = layer.experts
        up_gate, down = of(experts.experts.weight), of(experts.output_experts.weight)
        return *up_gate.chunk(2, dim=1), down.mT, of(layer.router.layer.weight)
    found = (of(p) for _, p in sorted(layer.named_parameters()))  # by name, as their order differs
    return [tensor for tensor in found if tensor is not None]


LAYER: dict[str, Callable[[DbrxConfig], nn.Module]] = {
    "loop": partial(our_layer, expert_impl="loop"),
    AS_RUN: our_layer,
    "ours, as modules": our_layer,
    "ours, grouped_gemm": partial(our_layer, expert_impl="grouped_gemm"),
    "transformers": transformers_layer,
    "foundry torch_dmoe": foundry_layer,
    "megablocks grouped": partial(megablocks_layer, mlp_impl="grouped"),
    "megablocks sparse": partial(megablocks_layer, mlp_impl="sparse"),
    "scattermoe": ScatterMoE,
}
NEEDS_GPU = {"ours, grouped_gemm", "megablocks grouped", "megablocks sparse", "scattermoe"}


# --- losses -------------------------------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor], Tensor]
"""(hidden [T, D], labels [T]) -> scalar."""


def our_loss(head: LMHead) -> Loss:
    return lambda hidden, labels: head(hidden, labels).total


def transformers_loss(head: LMHead) -> Loss:
    from transformers.loss.loss_utils import ForCausalLMLoss

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = ForCausalLMLoss(head(hidden), None, head.out_features, shift_labels=labels)
        return found

    return loss


def liger_loss(head: LMHead) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, labels: liger(head.weight, hidden, labels)


LOSS: dict[str, Callable[[LMHead], Loss]] = {
    "transformers": transformers_loss,
    AS_RUN: our_loss,
    "ours, as modules": our_loss,
    "liger": liger_loss,
}
