"""The forms of local task files as lm-eval's configurations: its own prompts, metrics and filters of the tasks they are of."""

from collections.abc import Mapping, Sequence
from typing import Any


def _mentions(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"mention": float(doc["target"].casefold() in results[0].casefold())}


def _mean(metric: str, **more: Any) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True, **more}


FORMS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: doc["query"],
        "doc_to_choice": lambda doc: doc["choices"],
        "doc_to_target": lambda doc: doc["gold"],
        "metric_list": [_mean("acc"), _mean("acc_norm")],
    },
    "contexts": {
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: doc["gold"],
        "doc_to_choice": lambda doc: doc["contexts"],
        "doc_to_target": lambda doc: doc["target"],
        "metric_list": [_mean("acc")],
    },
    "word": {
        "output_type": "loglikelihood",
        "doc_to_text": lambda doc: doc["query"],
        "doc_to_target": lambda doc: doc["target"],
        "target_delimiter": "",
        "metric_list": [
            _mean("acc"),
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "number": {
        "output_type": "generate_until",
        "doc_to_text": lambda doc: doc["query"],
        "doc_to_target": lambda doc: doc["target"],
        "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False},
        "metric_list": [
            _mean(
                "exact_match",
                ignore_case=True,
                ignore_punctuation=False,
                regexes_to_ignore=[",", "\\$", "(?s).*#### ", "\\.$"],
            )
        ],
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
    },
    "mention": {
        "output_type": "generate_until",
        "doc_to_text": lambda doc: doc["query"],
        "doc_to_target": lambda doc: doc["target"],
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 48},
        "process_results": _mentions,
        "metric_list": [_mean("mention")],
    },
}
