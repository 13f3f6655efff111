"""Router replay: a training pass uses the experts that the engine chose for each token, not those of its own router.

    indices = recorded routes of a token where there are any, else the router's own top-k
    scores  = softmax(router logits at these indices)

The logits, and so the gradients of router and hidden states, are the policy's; only the choice is the engine's. Where
both choose alike, nothing changes, in no bit. It removes the part of the mismatch between engine and policy that comes
from experts of nearly equal logits, which rounding exchanges (arXiv 2510.11370, "Rollout Routing Replay").

Routes are found by the tokens of a row, without padding: TRL may shuffle and divide batches as it likes. Reads and
writes nothing. Memory: 2 bytes * layers * K for each token of a generation batch, and as 8-byte integers for each of a
training pass. Shapes: B rows, T tokens, N = B * T, L layers, K experts per token, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_puzzle.model.modules import model_family, router_of

NONE = -1  # no route is known: the router's own
RouterOutput = tuple[Tensor, Tensor, Tensor]  # logits (N, E), scores (N, K), indices (N, K)


def routers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the router of every layer."""
    family = model_family(model)
    return [router_of(decoder, family) for decoder in model.model.layers]


def routed(output: RouterOutput, routes_NK: Tensor) -> RouterOutput:
    """Return a router's output with other choices.

    Args:
        output: of the router.
        routes_NK: experts of each token, in any order; `NONE`: the router's own. More than the router's K are ignored:
            layers with fewer experts choose fewer.
    """
    logits_NE, _, own_NK = output
    given_NK = routes_NK[:, : own_NK.shape[1]].to(own_NK)
    known_N1 = (given_NK >= 0).all(-1, keepdim=True)
    indices_NK = torch.where(known_N1, given_NK, own_NK)
    values_NK = logits_NE.gather(-1, indices_NK)
    return logits_NE, values_NK.softmax(dim=1, dtype=values_NK.dtype), indices_NK


class RouteReplay:
    """Replays routes in every forward pass of a policy whose rows it knows.

    Args:
        policy: the model as it is called, with `input_ids` and `attention_mask`.
        model: the causal language model inside any wrapper.

    Attributes:
        routes: routes (T, L, K) of each known sequence, an int16 tensor, by its tokens.
        replayed: tokens of the last pass whose routes were known, and all of them.
    """

    def __init__(self, policy: nn.Module, model: PreTrainedModel) -> None:
        self.routes: dict[tuple[int, ...], Tensor] = {}
        self.replayed = (0, 0)
        self._batch_NLK: Tensor | None = None
        policy.register_forward_pre_hook(self._find, with_kwargs=True)
        for layer, router in enumerate(routers_of(model)):
            router.register_forward_hook(partial(self._replay, layer))

    def remember(self, sequences: Sequence[Sequence[int]], routes: Sequence[Tensor]) -> None:
        """Take the routes of new sequences in place of all earlier ones.

        Args:
            sequences: token ids of prompts with completions.
            routes: of each sequence (T, L, K), or of its first tokens: the last token is generated, not read.
        """
        self.routes = {tuple(ids): route.to(torch.int16) for ids, route in zip(sequences, routes, strict=True)}

    def state(self) -> list[tuple[Tensor, Tensor]]:
        """Return the routes as tensors, for a checkpoint."""
        return [(torch.tensor(ids), route) for ids, route in self.routes.items()]

    def load_state(self, state: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Continue with saved routes."""
        self.routes = {tuple(ids.tolist()): route for ids, route in state}

    def _find(self, policy: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Lay out the routes of a batch before it runs; gradient checkpointing may run layers again after it."""
        self._batch_NLK = None
        if not self.routes:
            return
        ids_BT, mask_BT = kwargs["input_ids"], kwargs["attention_mask"].bool()
        layers, chosen = next(iter(self.routes.values())).shape[1:]
        batch_BTLK = torch.full((*ids_BT.shape, layers, chosen), NONE, dtype=torch.int16)
        known = 0
        for row, (ids_T, mask_T) in enumerate(zip(ids_BT.cpu(), mask_BT.cpu(), strict=True)):
            route = self.routes.get(tuple(ids_T[mask_T].tolist()))
            if route is not None:
                places = mask_T.nonzero()[: len(route), 0]
                batch_BTLK[row, places] = route
                known += len(route)
        self.replayed = (known, int(mask_BT.sum()))
        self._batch_NLK = batch_BTLK.flatten(0, 1).to(ids_BT.device)

    def _replay(self, layer: int, router: nn.Module, inputs: Any, output: RouterOutput) -> RouterOutput | None:
        if self._batch_NLK is None:
            return None
        if len(self._batch_NLK) != len(output[0]):
            raise ValueError(
                f"rollouts.replay_routes: a router got {len(output[0])} of {len(self._batch_NLK)} tokens of a batch. "
                "Replay needs whole batches: leave training.moe_chunk_tokens out."
            )
        return routed(output, self._batch_NLK[:, layer])


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Record the routes of forward passes inside: one tensor (N, K) for each router that ran, in order."""
    found: list[Tensor] = []

    def keep(router: nn.Module, inputs: Any, output: RouterOutput) -> None:
        found.append(output[2].detach())

    handles = [router.register_forward_hook(keep) for router in routers_of(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def sequences_of(routes: Sequence[Tensor], mask_BT: Tensor, chosen: int) -> list[Tensor]:
    """Return the routes (T, L, K) of each row of a batch, without padding, from what `recorded` found in one pass.

    Args:
        routes: of each layer (N, its K).
        mask_BT: which tokens are no padding.
        chosen: K; layers with fewer are filled with `NONE`.
    """
    wide = [nn.functional.pad(route, (0, chosen - route.shape[1]), value=NONE) for route in routes]
    all_BTLK = torch.stack(wide, dim=1).view(*mask_BT.shape, len(routes), chosen)
    return [row[mask.bool()].to(torch.int16) for row, mask in zip(all_BTLK, mask_BT, strict=True)]
