"""The two sides of a plain layer: its own weights, and the weights of the affine layers that read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from neutralize.dataflow import op_name
from neutralize.errors import NeutralizeError
from neutralize.planner import Request
from neutralize.rules import REARRANGE
from neutralize.sites import Affine, AffineSite, affine_site, describe

SIDES = {
    "in": "the layer's own weights",
    "out": "the weights that read it",
    "both": "its own weights and those that read it",
}


def check_sides(strategy: str, sides: str) -> None:
    """Check the name of a side.

    Raises:
        NeutralizeError: it is none.
    """
    if sides not in tuple(SIDES):  # by equality: what was given may not be hashable
        raise NeutralizeError(f"{strategy}: expected in, out or both for sides, got {sides!r}; use one of these")


def sites_of(request: Request, layer: str) -> list[AffineSite]:
    """The affine site of every call of a layer.

    Raises:
        NeutralizeError: a call is not one affine op.
    """
    found = [affine_site(request.flow, call) for call in request.calls(layer)]
    sites = [site for site in found if site is not None]
    if len(sites) != len(found):
        raise NeutralizeError(
            f"plan: expected one affine layer (linear, convolution) for {layer!r}, got a "
            f"{type(request.layers[layer]).__name__}; "
            "select the affine layers inside it, or use sides='in'"
        )
    return sites


def outgoing_consumers(request: Request, layer: str, *, required: bool) -> list[Affine]:
    """The affine ops that read a layer and that no other layer shares.

    Args:
        request: the request.
        layer: qualified name.
        required: whether it is an error if there are none, or if something else reads the layer too.

    Raises:
        NeutralizeError: see ``required``; or a consumer is shared with another path.
    """
    if not required and any(affine_site(request.flow, call) is None for call in request.calls(layer)):
        return []
    sites = sites_of(request, layer)
    consumers = unique(consumer for site in sites for consumer in site.consumers)
    others = [reader for site in sites for reader in site.other_readers]
    if required and (others or not consumers):
        found = ", ".join(sorted({describe(reader, request.flow) for reader in others})) or "nothing"
        raise NeutralizeError(
            f"plan: expected affine layers, and nothing else, to read {layer!r}, got {found}; use sides='in'"
        )
    if others:
        return []
    check_shared(request, layer, consumers)
    return consumers


def unique(consumers: Iterable[Affine]) -> list[Affine]:
    """Each op once, in order."""
    found: dict[fx.Node, Affine] = {}
    for consumer in consumers:
        found.setdefault(consumer.node, consumer)
    return list(found.values())


def check_shared(request: Request, layer: str, consumers: list[Affine]) -> None:
    """Check that the weights and biases of the consumers are read by nothing else.

    Raises:
        NeutralizeError: one is, perhaps because it is tied to another parameter; both are named.
    """
    nodes: dict[fx.Node, tuple[str, ...]] = {}
    for consumer in consumers:
        nodes[consumer.node] = tuple(name for name in (consumer.weight, consumer.bias) if name is not None)
        if consumer.added is not None:
            nodes[consumer.added] = ()
    check_own(request, layer, nodes)


def check_own(request: Request, layer: str, nodes: Mapping[fx.Node, tuple[str, ...]]) -> None:
    """Check that the parameters of ops are read by these ops alone.

    Args:
        request: the request.
        layer: qualified name of the layer that the ops read.
        nodes: each op with its parameters.

    Raises:
        NeutralizeError: one is read elsewhere, perhaps because it is tied to another parameter; both are named.
    """
    ours = set(nodes)
    for name in (name for names in nodes.values() for name in names):
        foreign = [user for user in request.flow.users(name) if not _read_by(user, ours)]
        if foreign:
            also = [alias for alias in request.flow.tied[name] if alias != name]
            tied = f" (it is tied to {', '.join(map(repr, also))})" if also else ""
            raise NeutralizeError(
                f"plan: expected {name!r}, which reads {layer!r}, to read nothing else, got a consumer that is "
                f"shared{tied}; rewriting it would change the other path: untie or copy it first, or use "
                "strategy='zero' with sides='in'"
            )


def _read_by(node: fx.Node, ours: set[fx.Node]) -> bool:
    """Whether a reader of a weight is one of our ops, or a view that only they (or nothing) read."""
    if node in ours:
        return True
    return op_name(node) in REARRANGE and all(_read_by(user, ours) for user in node.users)
