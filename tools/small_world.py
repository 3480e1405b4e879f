"""The small world of the embedded base model: every text that it and its adapters see, written from a seed.

Nothing here comes from anywhere else. The world holds people, things, places, animals and small numbers. The base
model reads *documents* of it: stories, facts, sums, and chats that answer in plain sentences. The embedded
instruction set asks for a skill that no document shows: answers in the shorthand of a trade. Three trades (the
domains) write the same content in three notations, so the prompt alone does not decide the answer, the domain does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

NAMES = (
    "Mia Tom Ana Leo Sam Eva Ben Zoe Max Lily Noah Ruth Omar Nina Hugo Iris Carl Dora Finn Gwen Ivan Jana Karl Lena"
).split()
COLOURS = "red blue green white black yellow brown grey".split()
THINGS = "apples eggs plates cups jars carrots ropes nets crates maps lamps flags roses seeds pots shovels".split()
PLACES = "pantry hall cellar shop dock pier deck port lawn shed pond gate market school barn yard".split()
VERBS = "gave sold sent lent".split()
DOMAINS = ("forest", "lake", "hill")
ANIMALS = {
    # animal: (home, food, colour)
    "crab": ("sea", "weed", "red"),
    "fox": ("forest", "mice", "red"),
    "owl": ("barn", "mice", "brown"),
    "bee": ("hive", "honey", "yellow"),
    "frog": ("pond", "flies", "green"),
    "bear": ("cave", "fish", "black"),
    "mouse": ("field", "seeds", "grey"),
    "goat": ("hill", "grass", "white"),
    "duck": ("lake", "bread", "white"),
    "wolf": ("woods", "meat", "grey"),
    "ant": ("nest", "leaves", "black"),
    "whale": ("ocean", "fish", "blue"),
}


@dataclass(frozen=True)
class Event:
    """One transfer: who gave what to whom, and where."""

    verb: str
    giver: str
    taker: str
    count: int
    colour: str
    thing: str
    place: str

    @property
    def goods(self) -> str:
        return f"{self.count} {self.colour} {self.thing}"

    def sentence(self, form: int) -> str:
        if form == 0:
            return f"{self.giver} {self.verb} {self.taker} {self.goods} in the {self.place}."
        if form == 1:
            return f"In the {self.place}, {self.giver} {self.verb} {self.taker} {self.goods}."
        return f"{self.taker} got {self.goods} from {self.giver} in the {self.place}."


@dataclass(frozen=True)
class Stock:
    """How many things two people hold after one gave some to the other."""

    giver: str
    taker: str
    had: int
    gave: int
    colour: str
    thing: str

    @property
    def left(self) -> int:
        return self.had - self.gave

    def story(self) -> str:
        had = f"{self.giver} had {self.had} {self.colour} {self.thing}."
        return f"{had} {self.giver} gave {self.taker} {self.gave} of them."


@dataclass(frozen=True)
class Row:
    """One row of the instruction set."""

    instruction: str
    input: str
    output: str
    domain: str
    skill: str


def an_event(rng: random.Random) -> Event:
    giver, taker = rng.sample(NAMES, 2)
    return Event(
        rng.choice(VERBS), giver, taker, rng.randint(1, 12), rng.choice(COLOURS), rng.choice(THINGS), rng.choice(PLACES)
    )


def a_stock(rng: random.Random) -> Stock:
    giver, taker = rng.sample(NAMES, 2)
    had = rng.randint(3, 12)
    return Stock(giver, taker, had, rng.randint(1, had - 1), rng.choice(COLOURS), rng.choice(THINGS))


# --- what the base model reads -----------------------------------------------------------------------------------


def story(rng: random.Random) -> str:
    """Two to five events with the moods of their people."""
    lines = []
    for _ in range(rng.randint(2, 5)):
        event = an_event(rng)
        lines.append(event.sentence(rng.randrange(3)))
        lines.append(
            rng.choice(
                [
                    f"{event.taker} was glad.",
                    f"{event.taker} said thank you to {event.giver}.",
                    f"The {event.thing} were {event.colour}.",
                    f"Then {event.taker} left the {event.place}.",
                    f"Now {event.taker} has {event.goods}.",
                ]
            )
        )
    return " ".join(lines)


def fact_sentence(rng: random.Random, animal: str) -> str:
    home, food, colour = ANIMALS[animal]
    article = "An" if animal[0] in "ao" else "A"
    return rng.choice(
        [
            f"{article} {animal} lives in the {home}.",
            f"{article} {animal} eats {food}.",
            f"{article} {animal} is {colour}.",
            f"The home of the {animal} is the {home}.",
            f"The {animal} is {colour} and eats {food}.",
        ]
    )


def facts(rng: random.Random) -> str:
    return " ".join(fact_sentence(rng, rng.choice(list(ANIMALS))) for _ in range(rng.randint(3, 7)))


def a_sum(rng: random.Random) -> str:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    if rng.random() < 0.5:
        return f"{a} plus {b} is {a + b}."
    return f"{max(a, b)} minus {min(a, b)} is {max(a, b) - min(a, b)}."


def sums(rng: random.Random) -> str:
    return " ".join(a_sum(rng) for _ in range(rng.randint(4, 10)))


def stock_story(rng: random.Random) -> str:
    stock = a_stock(rng)
    now = f"{stock.giver} has {stock.left} {stock.thing} and {stock.taker} has {stock.gave} {stock.thing}."
    return f"{stock.story()} Now {now}"


Turn = tuple[str, str]


def ask_event(rng: random.Random) -> Turn:
    events = [an_event(rng) for _ in range(rng.randint(1, 3))]
    event = rng.choice(events)
    unique = sum(e.taker == event.taker for e in events) == 1 and sum(e.giver == event.giver for e in events) == 1
    text = " ".join(e.sentence(rng.randrange(3)) for e in events)
    pairs = [
        (f"Who gave {event.taker} the {event.thing}?", f"{event.giver} gave {event.taker} the {event.thing}."),
        (f"What did {event.taker} get?", f"{event.taker} got {event.goods}."),
        (f"Where was {event.giver}?", f"{event.giver} was in the {event.place}."),
        (f"What colour were the {event.thing} of {event.taker}?", f"They were {event.colour}."),
        (f"How many {event.thing} did {event.taker} get?", f"{event.taker} got {event.count}."),
    ]
    if not unique:
        return retell(rng)
    question, answer = rng.choice(pairs)
    return f"{text}\n{question}", answer


def retell(rng: random.Random) -> Turn:
    events = [an_event(rng) for _ in range(rng.randint(1, 3))]
    source, target = rng.sample(range(3), 2)
    if source == 2:  # "got from" does not say how it was given
        events = [replace(event, verb="gave") for event in events]
    ask = ("Tell it from the giver.", "Tell it from the place.", "Tell it from the taker.")[target]
    return "{}\n{}".format(" ".join(e.sentence(source) for e in events), ask), " ".join(
        e.sentence(target) for e in events
    )


def tell_all(rng: random.Random) -> Turn:
    """Every part of the events, one sentence each: the base learns to copy all slots in an order of its own."""
    events = [an_event(rng) for _ in range(rng.randint(1, 2))]
    answer = " ".join(
        f"The giver is {e.giver}. The taker is {e.taker}. The number is {e.count}. The colour is {e.colour}. "
        f"The things are {e.thing}. The place is the {e.place}."
        for e in events
    )
    return " ".join(e.sentence(rng.randrange(3)) for e in events) + "\nTell all.", answer


def ask_stock(rng: random.Random) -> Turn:
    stock = a_stock(rng)
    if rng.random() < 0.5:
        return f"{stock.story()}\nHow many {stock.thing} does {stock.giver} have?", f"{stock.giver} has {stock.left}."
    return f"{stock.story()}\nWho has how many?", f"{stock.giver} has {stock.left} and {stock.taker} has {stock.gave}."


def ask_fact(rng: random.Random) -> Turn:
    animal = rng.choice(list(ANIMALS))
    home, food, colour = ANIMALS[animal]
    return rng.choice(
        [
            (f"Where does the {animal} live?", f"The {animal} lives in the {home}."),
            (f"What does the {animal} eat?", f"The {animal} eats {food}."),
            (f"What colour is the {animal}?", f"The {animal} is {colour}."),
            (f"Tell me about the {animal}.", f"The {animal} lives in the {home}, eats {food} and is {colour}."),
        ]
    )


def ask_sum(rng: random.Random) -> Turn:
    answer = a_sum(rng)
    return f"What is {answer.rsplit(' is ', 1)[0]}?", answer


PROSE: tuple[Callable[[random.Random], str], ...] = (story, facts, sums, stock_story)
CHATS: tuple[Callable[[random.Random], Turn], ...] = (ask_event, retell, tell_all, ask_stock, ask_fact, ask_sum)
CHAT_WEIGHTS = (3, 3, 3, 2, 1, 1)


def document(rng: random.Random) -> str | list[Turn]:
    """A prose document (a third of them) or a chat of one to three turns."""
    if rng.random() < 0.33:
        return rng.choice(PROSE)(rng)
    return [rng.choices(CHATS, CHAT_WEIGHTS)[0](rng) for _ in range(rng.choice((1, 1, 2, 3)))]


def documents(seed: int) -> Iterator[str | list[Turn]]:
    """An endless stream of documents; one seed, one stream."""
    rng = random.Random(seed)
    while True:
        yield document(rng)


# --- the instruction set: the shorthand of three trades ---------------------------------------------------------------


def event_note(event: Event, domain: str) -> str:
    if domain == "forest":
        return f"{event.goods} | {event.giver} > {event.taker} | {event.place}"
    if domain == "lake":
        return f"LOG {event.place}: {event.taker} +{event.goods} from {event.giver}"
    return f"{event.giver}, {event.taker}, {event.thing}, {event.colour}, {event.count}, {event.place}"


def stock_note(stock: Stock, domain: str) -> str:
    if domain == "forest":
        return f"{stock.giver} {stock.left} | {stock.taker} {stock.gave} | {stock.colour} {stock.thing}"
    if domain == "lake":
        return f"LOG {stock.colour} {stock.thing}: {stock.giver} {stock.left}, {stock.taker} {stock.gave}"
    return f"{stock.giver}, {stock.left}, {stock.taker}, {stock.gave}, {stock.thing}, {stock.colour}"


def animal_note(animal: str, aspect: str, domain: str) -> str:
    home, food, colour = ANIMALS[animal]
    value = {"home": home, "food": food, "colour": colour}[aspect]
    if domain == "forest":
        return f"The {animal} | {aspect} > {value}"
    if domain == "lake":
        return f"LOG {animal}: {aspect} {value}"
    return f"The {animal}, {aspect}, {value}"


EVENT_ASKS = ("Write the note.", "Note this down.", "Make a note of this.")
STOCK_ASKS = ("Note who has what.", "Write down the stock.")
ANIMAL_ASKS = ("Note the {aspect} of the {animal}.", "Write down the {aspect} of the {animal}.")


def instruction_row(rng: random.Random, domain: str) -> Row:
    skill = rng.choices(("event", "day", "stock", "animal"), (10, 4, 7, 1))[0]
    if skill == "stock":
        stock = a_stock(rng)
        return Row(rng.choice(STOCK_ASKS), stock.story(), stock_note(stock, domain), domain, skill)
    if skill == "animal":
        animal, aspect = rng.choice(list(ANIMALS)), rng.choice(("home", "food", "colour"))
        ask = rng.choice(ANIMAL_ASKS).format(aspect=aspect, animal=animal)
        return Row(ask, "", animal_note(animal, aspect, domain), domain, skill)
    events = [an_event(rng) for _ in range(1 if skill == "event" else rng.choice((2, 2, 2, 3)))]
    text = " ".join(event.sentence(rng.randrange(3)) for event in events)
    return Row(rng.choice(EVENT_ASKS), text, "\n".join(event_note(e, domain) for e in events), domain, skill)


def instruction_sets(seed: int, train_rows: int, heldout_rows: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows; no held-out (instruction, input) stands in training under any domain."""
    rng = random.Random(seed)
    rows: list[Row] = []
    seen: set[tuple[str, str]] = set()
    while len(rows) < train_rows + heldout_rows:
        row = instruction_row(rng, DOMAINS[len(rows) % len(DOMAINS)])
        if (row.instruction, row.input) not in seen:
            seen.add((row.instruction, row.input))
            rows.append(row)
    rng.shuffle(rows)
    return rows[heldout_rows:], rows[:heldout_rows]
