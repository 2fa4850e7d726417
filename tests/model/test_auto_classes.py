from typing import Any

import pytest
from transformers.models.auto import modeling_auto

from lighten.facts import Task
from lighten.model.auto_classes import TABLES, table, task_of


@pytest.mark.parametrize("task", TABLES)
def test_the_tables_are_those_of_transformers(task: Task) -> None:
    known = getattr(modeling_auto, TABLES[task])
    assert table(task).items() >= {
        (name, (value,) if isinstance(value, str) else tuple(value)) for name, value in known.items()
    }


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "causal"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "causal"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "causal"),
        ({"model_type": "bert", "is_decoder": True, "architectures": ["BertModel"]}, "causal"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "masked"),
        ({"model_type": "eurobert", "architectures": ["EuroBertForMaskedLM"]}, "masked"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "embedding"),
        ({"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]}, "other"),
        ({"model_type": "marian", "is_encoder_decoder": True, "architectures": ["MarianMTModel"]}, "seq2seq"),
        ({"model_type": "m2m_100", "architectures": ["M2M100ForConditionalGeneration"]}, "seq2seq"),
        ({"model_type": "bart", "architectures": ["BartForCausalLM"], "is_encoder_decoder": False}, "causal"),
        ({"model_type": "of-its-own"}, "causal"),
    ],
)
def test_what_a_model_is_for(config: dict[str, Any], task: Task) -> None:
    assert task_of(config) == task
