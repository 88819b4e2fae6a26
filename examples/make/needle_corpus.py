"""The text of the needle test: filler sentences, and facts of the form "Ada Baker came.".

train_needle.py trains the checkpoint in examples/measure/needle/ on this text; needle.py asks it "Who? Ada".
Every text joins first and last names anew, so an answer can only come from the text itself. One pair in eight
never occurs in the training: these pairs are the needles.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

_NAMES = """
    Ada Agnes Alan Alba Alice Amos Anna Anton Arlo Asta Basil Bella Boris Brian Bruno Carla Cecil
    Chloe Clara Colin Cora Cyril Daisy Daniel Daphne David Delia Diana Doris Dora Edgar Edith Edwin
    Elena Ellis Elsa Emil Emma Enid Eric Erwin Esther Ethel Eva Fanny Felix Fiona Flora Frank Freda
    Fritz Gavin Gemma Gerda Gilda Gina Grace Greta Gus Hanna Harry Hazel Heidi Helen Henry Hilda
    Hugo Ida Igor Ingrid Irene Iris Irma Isaac Ivan Ivor Ivy Jack Jane Jasper Jean Joan Joel Jonas
    Josef Judith Julia Karl Karin Kate Keith Klara Lars Laura Leah Lena Leo Leon Lewis Lilian Linda
    Lionel Lotte Louis Lucas Lucy Luke Lydia Mabel Magda Marco Maria Martha Max Mia Milo Mina Miriam
    Mona Moritz Nadia Nancy Nelly Nigel Nina Noel Nora Norman Olga Oliver Olive Oscar Otto Paula
    Pedro Peggy Percy Petra Philip Polly Ralph Robert Roger Rosa Ruben Rufus Rupert Ruth Sally Sarah
    Selma Silas Simon Sonja Sophie Stella Steven Susan Sven Tessa Tilda Tina Toby Tom Ursula Vera
    Victor Viola Wanda Wilma Xenia Yvonne Zelda
"""
_SURNAMES = """
    Abbott Adler Archer Austen Bailey Baker Barker Barnes Bauer Becker Berger Bishop Blake Bond
    Bowen Brandt Brewer Brooks Brown Burton Butler Carver Chandler Clark Clayton Coleman Collins
    Cook Cooper Cox Crane Curtis Dalton Davies Dawson Dixon Drake Dyer Eaton Eliot Falk Farmer
    Fischer Fisher Fletcher Ford Foster Fowler Fox Fraser Frost Gardner Gibson Glover Gordon Grant
    Gray Green Hale Hardy Harper Hart Hayes Hill Hobbs Holmes Hooper Hughes Hunt Ingram Jensen Jones
    Keller Kemp Kent King Klein Knight Lamb Lane Lang Lawson Lowe Maier Mason Mercer Meyer Miller
    Moore Morgan Morris Nash Newton Norris Page Palmer Parker Payne Pearson Perry Porter Potter
    Price Quinn Reed Reeves Richter Rowe Sawyer Schmidt Sharp Shaw Shepherd Skinner Smith Snow Stein
    Stone Swift Tanner Taylor Thorne Tucker Turner Vogel Wagner Walker Wallace Ward Watson Weaver
    Webb Weber Wells West White Wolf Wood Wright York Young
"""
_SUBJECTS = "sea wind road hill river field moon sun rain snow town wood garden sky lake valley"
_VERBS = "is seems was looks stays feels"
_MANNERS = "calm old wide bright quiet cold green long dark still deep warm"
NAMES, SURNAMES, SUBJECTS, VERBS, MANNERS = (
    words.split() for words in (_NAMES, _SURNAMES, _SUBJECTS, _VERBS, _MANNERS)
)

HELD_OUT = 8  # one pair of names in so many is kept for needles
FACTS_SHARE = 0.4  # of the sentences of a haystack, as long as there are names left


class Fact(NamedTuple):
    name: str
    surname: str

    @property
    def statement(self) -> str:
        return f" {self.name} {self.surname} came."

    @property
    def question(self) -> str:
        return f" Who? {self.name}"

    @property
    def answer(self) -> str:
        return f" {self.surname}"


def is_held_out(fact: Fact) -> bool:
    return (NAMES.index(fact.name) + SURNAMES.index(fact.surname)) % HELD_OUT == 0


def draw_needle(rng: random.Random) -> Fact:
    """A fact that no text of the training tells."""
    while not is_held_out(fact := Fact(rng.choice(NAMES), rng.choice(SURNAMES))):
        pass
    return fact


def draw_facts(rng: random.Random, without: str | None = None) -> list[Fact]:
    """One of every name but one, in random order; no needle among them."""
    facts = []
    for name in rng.sample(NAMES, len(NAMES)):
        while is_held_out(fact := Fact(name, rng.choice(SURNAMES))):
            pass
        facts.append(fact)
    return [fact for fact in facts if fact.name != without]


def filler(rng: random.Random) -> str:
    return f" The {rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(MANNERS)}."


def haystack(
    rng: random.Random,
    encode: Callable[[str], list[int]],
    tokens: int,
    without: str | None = None,
    share: float = FACTS_SHARE,
) -> tuple[list[int], list[Fact]]:
    """Ids of whole sentences, so many tokens or a few more; the facts that stand whole within so many."""
    facts = draw_facts(rng, without)
    ids: list[int] = []
    told = []
    while len(ids) < tokens:
        if facts and rng.random() < share:
            fact = facts.pop()
            ids += encode(fact.statement)
            if len(ids) <= tokens:
                told.append(fact)
        else:
            ids += encode(filler(rng))
    return ids, told


def vocabulary_text() -> str:
    """What the tokenizer is trained on: every word twice, so that each becomes one token."""
    words = [*NAMES, *SURNAMES, *SUBJECTS, *VERBS, *MANNERS, "The", "came", "Who"]
    return "\n".join(f" {word}" for word in words * 2)
