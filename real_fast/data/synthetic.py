"""Judge rows with known labels, made up: "Name five fruits." with seeded mistakes, for the quickstart and for tests.

A response's score is the number of its right items, 1 at least. Evaluation has categories (and so prompts and items)
that training never sees.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from real_fast.utils.jsonio import write_jsonl

RUBRIC = "One point per right item, 1 at least."
ITEMS = 5

# What "synthetic:train" and "synthetic:eval" stand for: (prompts, responses per prompt).
SIZES: dict[str, tuple[int, int]] = {"train": (200, 10), "eval": (60, 4)}

WORDINGS = (
    "Name five {}.",
    "List five {}.",
    "Give me five {}.",
    "Write down five {}.",
    "Tell me five {}.",
    "Think of five {}.",
    "What are five {}?",
    "Can you name five {}?",
    "I need five {}.",
    "Please list five {}.",
)

# No item may also belong to another category of its own side (TRAIN or EVAL): mistakes are drawn from those.
TRAIN = {
    "fruits": "apple banana cherry grape lemon lime mango melon peach pear plum apricot papaya strawberry",
    "mammals": "lion tiger elephant giraffe zebra wolf fox bear rabbit deer monkey squirrel camel otter",
    "fish": "salmon tuna trout cod carp shark herring sardine halibut mackerel eel haddock catfish anchovy",
    "insects": "ant bee wasp beetle butterfly moth mosquito grasshopper "
    "dragonfly ladybug termite cockroach flea locust",
    "flowers": "tulip daisy orchid sunflower daffodil lily carnation marigold poppy rose iris petunia hyacinth begonia",
    "cities": "Paris London Berlin Madrid Rome Tokyo Chicago Moscow Vienna Dublin Toronto Sydney Lisbon Athens",
    "languages": "English French German Spanish Italian Russian Chinese Japanese "
    "Arabic Hindi Korean Dutch Greek Swedish",
    "body parts": "arm leg head knee elbow shoulder ankle wrist nose ear chin thumb toe neck",
    "pieces of clothing": "shirt trousers jacket coat sweater skirt dress sock scarf glove hat jeans blouse vest",
    "tools": "hammer screwdriver wrench saw drill pliers chisel axe shovel rake spade crowbar trowel pickaxe",
    "sports": "soccer tennis basketball hockey golf rugby baseball volleyball "
    "swimming boxing badminton skiing judo wrestling",
    "vehicles": "car bus truck bicycle train airplane boat ship motorcycle tractor taxi tram helicopter scooter",
    "shapes": "circle square triangle rectangle oval pentagon hexagon cube "
    "sphere cone cylinder pyramid octagon trapezoid",
    "relatives": "mother father brother sister uncle aunt cousin grandmother "
    "grandfather nephew niece son daughter grandson",
    "emotions": "joy anger fear sadness love hate envy pride shame guilt hope disgust grief jealousy",
    "kinds of weather": "rain snow hail fog thunder lightning sunshine drizzle "
    "blizzard hurricane tornado sleet frost wind",
    "school subjects": "math history geography biology chemistry physics art music "
    "literature economics algebra philosophy grammar geometry",
    "buildings": "house church school hospital castle hotel library museum theater barn factory temple palace prison",
    "desserts": "cake cookie pie brownie pudding donut cupcake tiramisu cheesecake muffin sundae custard sorbet tart",
    "office supplies": "pencil pen eraser notebook marker stapler glue crayon "
    "paper highlighter envelope folder binder paperclip",
    "rivers": "Nile Amazon Danube Thames Rhine Mississippi Volga Ganges Seine Mekong Congo Yangtze Missouri Tigris",
    "drinks": "coffee tea milk water juice beer wine soda lemonade whiskey vodka cider gin rum",
    "metals": "chromium gold silver copper tin zinc aluminum nickel steel platinum titanium brass cobalt tungsten",
    "spices": "basil oregano thyme cumin cinnamon nutmeg paprika turmeric "
    "saffron parsley rosemary cardamom clove coriander",
}
EVAL = {
    "vegetables": "carrot cabbage spinach broccoli onion celery lettuce cauliflower "
    "radish turnip leek zucchini kale beet",
    "birds": "eagle sparrow owl parrot pigeon robin crow swan penguin falcon hawk seagull flamingo raven",
    "musical instruments": "piano guitar violin drum flute trumpet cello harp "
    "clarinet saxophone trombone banjo accordion oboe",
    "countries": "France Germany Italy Spain Brazil Canada Japan China India Egypt Mexico Kenya Norway Sweden",
    "pieces of furniture": "chair table sofa bed desk bookcase wardrobe stool "
    "bench dresser cupboard armchair couch cabinet",
    "jobs": "doctor teacher nurse lawyer farmer pilot plumber carpenter "
    "baker dentist engineer waiter painter electrician",
    "colors": "red blue green yellow purple black white brown gray pink turquoise beige magenta scarlet",
    "trees": "oak pine maple birch willow cedar elm spruce fir beech poplar sycamore redwood cypress",
}


def categories(which: str) -> dict[str, list[str]]:
    """Categories with their items: those of "train", of "eval", or of "all". Raises ValueError for anything else."""
    if which not in ("train", "eval", "all"):
        raise ValueError(f"which is {which!r}: there are train, eval and all")
    chosen = {"train": TRAIN, "eval": EVAL, "all": TRAIN | EVAL}[which]
    return {name: items.split() for name, items in chosen.items()}


def generate(n_prompts: int, responses_per_prompt: int, seed: int, which: str = "all") -> list[dict[str, Any]]:
    """Make rows; the same arguments give the same rows.

    Args:
        n_prompts: Prompts, spread evenly over the categories.
        responses_per_prompt: Different responses to each; over all rows every score comes up equally often.
        seed: Seed of everything random.
        which: str to take. A training category's mistakes are items of training categories, and likewise for
            evaluation.

    Returns:
        ``n_prompts * responses_per_prompt`` rows with the fields id, prompt_id, instruction, response, rubric,
        reference_answer (empty), score (int, 1 to 5), feedback and category. The feedback says of each item
        whether it is right, and states no score.

    Raises:
        ValueError: A number below 1, or more prompts than categories and wordings give.
    """
    chosen = categories(which)
    most = len(chosen) * len(WORDINGS)
    if not 1 <= n_prompts <= most:
        raise ValueError(f"n_prompts is {n_prompts}: {which!r} has 1 to {most} different prompts")
    if responses_per_prompt < 1:
        raise ValueError(f"responses_per_prompt is {responses_per_prompt}: at least 1 is needed")
    rng = random.Random(seed)
    wordings = {name: rng.sample(range(len(WORDINGS)), len(WORDINGS)) for name in chosen}
    rows: list[dict[str, Any]] = []
    scores: list[int] = []
    order: list[str] = []
    for prompt in range(n_prompts):
        if not order:
            order = rng.sample(list(chosen), len(chosen))
        category = order.pop()
        wording = wordings[category][prompt // len(chosen)]
        prompt_id = f"{category.replace(' ', '-')}-{wording}"
        seen: set[str] = set()
        while len(seen) < responses_per_prompt:
            if not scores:
                scores = rng.sample(range(1, ITEMS + 1), ITEMS)
            row = _answer(category, scores[-1], rng)
            if row["response"] in seen:
                continue
            scores.pop()
            seen.add(row["response"])
            instruction = WORDINGS[wording].format(category)
            rows.append({"id": f"{prompt_id}-{len(seen)}", "prompt_id": prompt_id, "instruction": instruction} | row)
    return rows


def _answer(category: str, score: int, rng: random.Random) -> dict[str, Any]:
    """A response of five different items that earns `score`, with its feedback."""
    right = rng.choice((0, 1)) if score == 1 else score
    side = categories("eval" if category in EVAL else "train")
    others = [item for name, items in side.items() if name != category for item in items]
    wrong = rng.sample(others, ITEMS - right)
    items = rng.sample(side[category], right) + wrong
    rng.shuffle(items)
    return {
        "response": ", ".join(items),
        "rubric": RUBRIC,
        "reference_answer": "",
        "score": score,
        # Item by item, since a small model writes what it can read off; the count is left to the score.
        "feedback": ", ".join(f"{item} {'no' if item in wrong else 'yes'}" for item in items) + ".",
        "category": category,
    }


def write(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)


def main(argv: list[str] | None = None) -> None:
    """The command line: ``python -m real_fast.data.synthetic --output rows.jsonl``."""
    parser = argparse.ArgumentParser(
        "python -m real_fast.data.synthetic", description="Make judge rows with known labels."
    )
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--responses", type=int, default=5, help="responses per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--categories", choices=("train", "eval", "all"), default="all")
    args = parser.parse_args(argv)
    try:
        rows = generate(args.prompts, args.responses, args.seed, args.categories)
        write(args.output, rows)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{len(rows)} rows of {args.prompts} prompts written to {args.output}")


if __name__ == "__main__":
    main()
