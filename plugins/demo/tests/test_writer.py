import pytest

from kd_demo.grammar import THEME_LIST, THEMES, TOPICS
from kd_demo.options import ScriptedWriterOptions
from kd_demo.writer import ScriptedWriter
from kdcore import Task
from kdcore.options import Sampling

PROMPTS = [f"Write on: {topic}" for topic in TOPICS] * 20
SEEDS = list(range(len(PROMPTS)))


def writer(**options: float) -> ScriptedWriter:
    return ScriptedWriter(ScriptedWriterOptions(**options), Task("classification", TOPICS))


def on_topic(text: str, topic: str) -> bool:
    return any(word in words.split() for pair in THEMES[topic].values() for words in pair for word in text.split())


@pytest.mark.parametrize(("mistakes", "low", "high"), [(0.0, 1.0, 1.0), (0.5, 0.35, 0.65), (1.0, 0.0, 0.0)])
def test_it_writes_on_the_topic_as_often_as_asked(mistakes, low, high):
    answers = writer(mistakes=mistakes, silence=0, confusion=0).generate(PROMPTS, Sampling(), SEEDS)
    right = [on_topic(found[0].text, p.split()[-1]) for found, p in zip(answers, PROMPTS, strict=True)]
    assert low <= sum(right) / len(right) <= high


def test_an_answer_depends_on_its_prompt_and_seed_alone():
    whole = writer().generate(PROMPTS, Sampling(n=2), SEEDS)
    assert writer().generate(PROMPTS[7:9], Sampling(n=2), SEEDS[7:9]) == whole[7:9]
    assert whole[0][0] != whole[0][1]
    assert 0 < sum(not found[0].text for found in whole) < len(whole) / 4


def test_it_says_nothing_where_no_topic_is_named_and_reads_chats():
    assert writer().generate(["Write."], Sampling(), [0])[0][0].text == ""
    chat = [{"role": "user", "content": f"Not {TOPICS[1]}, but {TOPICS[2]}"}]
    assert on_topic(writer(mistakes=0, silence=0, confusion=0).generate([chat], Sampling(), [0])[0][0].text, TOPICS[2])
    assert len(THEME_LIST) == 18
