"""``poise methods``: what is built in, and where it comes from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from poise.cli.args import Parser
from poise.core.errors import UserError, nearest
from poise.core.registry import Card, cards_of


def main(words: Sequence[str]) -> int:
    """List the cards, or show one."""
    parser = Parser("methods", "List the stability methods that recipes can name.", "poise methods show qk_norm")
    parser.add_argument("what", nargs="*", metavar="show NAME", help="show NAME: all that is known of one method")
    parser.add_argument("--json", action="store_true", help="print the cards as JSON")
    arguments = parser.parse_args(list(words))
    cards = all_cards()
    if arguments.what:
        if len(arguments.what) != 2 or arguments.what[0] != "show":
            raise UserError("write: poise methods, or: poise methods show NAME")
        name = arguments.what[1]
        if name not in cards:
            raise UserError(f"no method '{name}'{nearest(name, cards)}; see poise methods")
        cards = {name: cards[name]}
    if arguments.json:
        print(json.dumps([dataclasses.asdict(card) | _more(card) for card in cards.values()], indent=2))
    elif arguments.what:
        for field in dataclasses.fields(Card):
            print(f"{field.name + ':':<10} {getattr(cards[name], field.name)}")
        for title, said in _more(cards[name]).items():
            _print_more(title.replace("_", " "), said)
    else:
        width = max(map(len, cards))
        for card in cards.values():
            print(f"{card.name:<{width}}  {card.kind:<9}  {card.title}")
    return 0


def _more(card: Card) -> dict[str, Any]:
    """Return what a model method's file says besides its card, the same fields for text and JSON."""
    if card.kind != "model":
        return {}
    from poise.model import methods_page

    return {
        "settings": dict(methods_page.settings(card.name)),
        **{title.lower().replace(" ", "_"): text for title, text in methods_page.said(card.name)},
        "not_with": methods_page.excluded(card.name),
    }


def _print_more(title: str, said: Any) -> None:
    from poise.model.settings import shown

    if title == "settings":
        said = ", ".join(shown(*pair) for pair in said.items()) or "none"
    if title == "not with":
        for other, why in said.items():
            print(f"{title} {other}: {why}")
    else:
        print(f"{title}: {said}")


def all_cards() -> dict[str, Card]:
    """Return every method's card by name, in the order of the rooms."""
    from poise import guard, optim
    from poise.model import methods

    return {card.name: card for card in [*methods.cards(), *cards_of(optim.METHODS), *cards_of(guard.METHODS)]}
