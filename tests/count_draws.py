"""Counts the draws of `make fuzz` in pytest's reports, and writes results/reliability.json.

python tests/count_draws.py build/fuzz.xml
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from emotion.utils.files import write_json  # noqa: E402
from emotion.utils.machine import choose_threads, describe_run  # noqa: E402

# Test -> what it draws
TITLES = {
    "test_no_damage_of_an_artifact_changes_its_answer_in_silence": "damaged artifacts, with sums and without",
    "test_random_flags_end_in_one_line_or_are_taken": "flags",
    "test_random_configs_end_in_one_line_or_are_taken": "recipes",
    "test_a_random_dataset_opens_or_is_refused": "folders of datasets",
    "test_random_texts_have_one_finite_answer_each": "texts",
    "test_no_fault_of_a_hub_is_more_than_a_line": "faults of a Hub",
    "test_no_damage_of_results_ends_in_a_traceback": "damaged results",
    "test_a_training_that_is_killed_ends_as_if_nothing_had_happened": "trainings killed with -9 and resumed",
    "test_two_trainings_at_once_never_mix": "pairs of trainings into one place",
}


def main() -> None:
    kinds = {}
    cases = [case for path in sys.argv[1:] for case in ElementTree.parse(path).iter("testcase")]
    for case in cases:
        title = TITLES[case.get("name").split("[")[0]]
        kind = kinds.setdefault(title, {"draws": 0, "failed_tests": 0, "seconds": 0.0})
        draws = [int(one.get("value")) for one in case.iter("property") if one.get("name") == "draws"]
        kind["draws"] += sum(draws) if draws else 1
        kind["failed_tests"] += any(case.find(end) is not None for end in ("failure", "error"))
        kind["seconds"] = round(kind["seconds"] + float(case.get("time")), 1)
    results = ROOT / "results"
    write_json(results / "reliability.json", describe_run(choose_threads(None)) | {"kinds": kinds})
    print(f"wrote {results}/reliability.json; make report renders it")


if __name__ == "__main__":
    main()
