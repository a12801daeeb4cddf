"""Write a small made-up stand-in for the dair-ai/emotion data set, for machines that have neither it nor the Hub.

Run it with:  python sample/make_sample.py

It writes train.jsonl (360 rows), validation.jsonl (90) and test.jsonl (90) next to itself, one
{"text": "...", "label": 0} a line, balanced over the six classes; every run writes the same bytes.
A sentence is a feeling, a situation and sometimes an ending, all hand-written below. No pair of feeling and
situation is used twice, and two thirds of the validation and test rows describe situations train does not have.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

SEED = 20
NAMES = ["sadness", "joy", "love", "anger", "fear", "surprise"]
ROWS = {"train": 360, "validation": 90, "test": 90}
PER_CLASS = {split: rows // len(NAMES) for split, rows in ROWS.items()}
SEEN_SITUATION = 5  # rows per class in validation and in test that pair a feeling anew with a situation from train

# Per class, phrases parted by "/": 10 feelings; 10 situations for train, 2 for validation, 2 for test; 3 endings.
PARTS = {
    "sadness": {
        "feelings": """i feel gloomy / i feel so heavy hearted / i have been feeling low / i feel a dull sadness
        / i keep feeling miserable / i feel close to tears / i miss the way things were / i am feeling terribly lonely
        / i wake up feeling defeated / i feel like my heart is broken""",
        "train": """now that my best friend has moved away / because my grandmother no longer remembers me
        / since we had to say goodbye to our old dog / because nobody came to my recital
        / now that the house is so quiet / since i failed the exam i had studied months for
        / because my sister and i hardly talk anymore / since the little bookshop on our street closed
        / because the team let me go last week / now that the summer with my cousins is over""",
        "validation": "because my plans for university fell through / now that my garden has died in the frost",
        "test": "since my father left for another city / because the choir will never sing together again",
        "endings": "and i cannot shake it off / and even music does not help / but i try not to show it",
    },
    "joy": {
        "feelings": """i feel cheerful / i feel so happy and light / i am feeling wonderfully content / i feel pure joy
        / i keep smiling and feeling good / i feel proud and delighted / i am left feeling thrilled
        / i cannot stop grinning / i wake up feeling lucky / i feel on top of the world""",
        "train": """because my first loaf of bread came out perfect / now that the exams are finally over
        / because my little brother learned to ride a bike / since i got the apprenticeship i wanted
        / because the sun is out and the lake is warm / now that we have the keys to our new flat
        / because our band played its first concert / since the doctor told me my knee has healed
        / because my whole family is coming for dinner / now that i can run five miles without a break""",
        "validation": "because our school play sold every ticket / now that my tomatoes are ripe at last",
        "test": "since the puppy came home with us / because my painting hangs in the town gallery",
        "endings": "and i want to tell everyone / and the whole day seems brighter / and nothing can spoil it",
    },
    "love": {
        "feelings": """i feel so much love / i feel tender inside / i am feeling deeply affectionate
        / i feel a deep longing / i feel cherished and adored / i feel a warm devotion / my heart melts and i feel soft
        / i feel so fond and caring / i feel hopelessly smitten / i am left feeling treasured""",
        "train": """when my wife hums while she cooks / when my husband saves me the last slice of cake
        / every time we dance slowly in the kitchen / when my girlfriend falls asleep on my shoulder
        / because my partner wrote me a letter for our anniversary / every time he holds my hand in the cinema
        / when i look at our wedding photographs / because she waited for me at the station in the rain
        / whenever we talk on the phone until midnight / because my boyfriend keeps every ticket from our dates""",
        "validation": "when she laughs at my silliest jokes / because my fiance learned my favourite song",
        "test": "when he tucks the blanket around me / every time we watch the stars from our balcony",
        "endings": "and i hope it never changes / and i never want to let go / and the world seems gentle",
    },
    "anger": {
        "feelings": """i feel furious / i am feeling really irritated / i feel so mad i could shout
        / i feel bitter and resentful / i feel my temper rising / i am left feeling outraged / i feel a cold anger
        / i feel insulted and cross / i feel fed up and hostile / i am grumpy and feel like slamming doors""",
        "train": """because my neighbour drills at six in the morning / because somebody scratched my car and drove off
        / when my boss takes credit for my work / because my roommate ate the lunch i had packed
        / since the landlord refuses to fix the heating / when people push past me in the queue
        / because my brother lied to our parents about me / since the airline lost my bag and blames me
        / when my colleague interrupts every word i say / because they cancelled my shift without telling me""",
        "validation": "because the referee ignored such an obvious foul / when drivers park across my gate",
        "test": "since my cousin broke my camera and denied it / because the bank charged me twice",
        "endings": "and i am done being polite / and nobody even says sorry / and i have to grit my teeth",
    },
    "fear": {
        "feelings": """i feel scared / i feel so nervous / i am feeling really anxious / i feel terrified and small
        / i feel a creeping fear / i keep feeling shaky and uneasy / i am left feeling panicky / i feel worried sick
        / i feel my hands tremble / i feel tense and paranoid""",
        "train": """because i have to speak in front of the whole school / when i hear footsteps behind me at night
        / because the test results come back tomorrow / when the plane starts to shake
        / since somebody tried to break into our house / because the storm is getting closer to the coast
        / when i walk through the dark parking garage / because my operation is on monday
        / when i stand near the edge of a cliff / since strange calls keep coming to my phone""",
        "validation": "because the lift has stopped between two floors / when the big dog next door growls at me",
        "test": "since i saw smoke above the forest near our village / because my driving test is in an hour",
        "endings": "and i can hardly breathe / and my heart will not slow down / but i try to stay calm",
    },
    "surprise": {
        "feelings": """i feel amazed / i feel so surprised / i am feeling utterly astonished / i feel dumbfounded
        / i feel stunned and speechless / i am left feeling dazed / i feel completely taken aback
        / i feel shocked in a good way / i feel strangely impressed / i am still feeling startled""",
        "train": """because my quiet uncle turned out to be a magician / after a stranger returned the wallet i lost
        / because my old teacher knew my name after twenty years / after it snowed here in the middle of may
        / because my friends were all hiding behind the sofa / after finding a forgotten letter inside the piano
        / because i won a raffle i do not remember entering / after my shy sister got up and sang at the wedding
        / because the parcel i opened was full of old coins / after learning that my neighbour is my cousin""",
        "validation": "because a deer walked straight into our kitchen / after our lost cat came back on her own",
        "test": "because my grandfather suddenly spoke japanese / after the empty shop became a theatre overnight",
        "endings": "and i never saw it coming / and i wonder if it is real / and i have so many questions",
    },
}


def phrases(text: str) -> list[str]:
    """The phrases of one entry of PARTS, with line breaks and runs of blanks made one blank."""
    return [" ".join(phrase.split()) for phrase in text.split("/")]


def class_pairs(parts: dict[str, list[str]], rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    """One class's (feeling, situation) pairs for each split."""
    grid = [(feeling, situation) for feeling in parts["feelings"] for situation in parts["train"]]
    rng.shuffle(grid)
    pairs = {"train": [grid.pop() for _ in range(PER_CLASS["train"])]}
    for split in ["validation", "test"]:
        seen = [grid.pop() for _ in range(SEEN_SITUATION)]
        unseen = [(feeling, situation) for feeling in parts["feelings"] for situation in parts[split]]
        pairs[split] = seen + rng.sample(unseen, PER_CLASS[split] - SEEN_SITUATION)
    return pairs


def make_splits() -> dict[str, list[dict]]:
    """All three splits as lists of rows, in their final order."""
    rng, splits = random.Random(SEED), {split: [] for split in ROWS}
    for label, name in enumerate(NAMES):
        parts = {key: phrases(text) for key, text in PARTS[name].items()}
        for split, pairs in class_pairs(parts, rng).items():
            for pair in pairs:
                text = " ".join([*pair, rng.choice(["", *parts["endings"]])]).strip()
                splits[split].append({"text": text, "label": label})
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def check(splits: dict[str, list[dict]]) -> None:
    """Assert what the docstring promises about the rows."""
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts) == sum(ROWS.values()), "a text occurs twice"
    for split, rows in splits.items():
        assert Counter(row["label"] for row in rows) == dict.fromkeys(range(len(NAMES)), PER_CLASS[split]), split
        named = Counter()
        for row in rows:
            words, name = row["text"].split(" "), NAMES[row["label"]]
            assert re.fullmatch("[a-z]+( [a-z]+)*", row["text"]) and 5 <= len(words) <= 25, row
            assert "i" in words and not set(words) & (set(NAMES) - {name}), row
            named[name] += name in words
        assert all(count <= PER_CLASS[split] / 3 for count in named.values()), named
    for parts in PARTS.values():
        unseen = phrases(parts["validation"]) + phrases(parts["test"])
        assert not any(situation in row["text"] for situation in unseen for row in splits["train"]), unseen
        for situation in unseen + phrases(parts["train"]):
            for pair in (f"{feeling} {situation}" for feeling in phrases(parts["feelings"])):
                assert sum(text.startswith(pair) for text in texts) <= 1, pair


def main() -> None:
    check(splits := make_splits())
    for split, rows in splits.items():
        path = Path(__file__).resolve().with_name(f"{split}.jsonl")
        partial = path.with_suffix(".partial")
        partial.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
        partial.replace(path)
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
