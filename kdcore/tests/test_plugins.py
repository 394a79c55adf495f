"""Registration, look-up and observation. (Broken distributions are tested in the workspace's tests.)"""

from __future__ import annotations

import sys
import types

import pytest

from kdcore import Component, Paper, PluginManager, hookimpl
from kdcore.errors import ComponentError, PluginError


def loss(name="mine", **more):
    return Component("loss", name, lambda options: None, **more)


class Mine:
    @hookimpl
    def kd_register_losses(self):
        return [loss(tags=("logits",))]


@pytest.fixture
def manager():
    return PluginManager(discover=False)


def test_a_class_an_instance_and_a_module_all_register(manager):
    module = types.ModuleType("my_module")
    module.kd_register_losses = hookimpl(lambda: [loss("from-module")])
    manager.register(Mine)
    manager.register(module)
    assert [c.name for _, c in manager.components("loss")] == ["from-module", "mine"]
    assert manager.components(tag="logits")[0][1].name == "mine"
    with pytest.raises(PluginError, match="already registered"):
        manager.register(Mine())


def test_a_name_offered_twice_needs_its_distribution(manager):
    manager.register(Mine(), name="one")
    manager.register(Mine(), name="two")
    with pytest.raises(ComponentError, match="write 'one:mine' or 'two:mine'"):
        manager.get("loss", "mine")
    assert manager.get("loss", "two:mine").name == "mine"


def test_an_unknown_name_offers_the_nearest(manager):
    manager.register(Mine())
    with pytest.raises(ComponentError, match="unknown loss 'mien'; did you mean 'mine'"):
        manager.get("loss", "mien")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "not NoneType"),
        ("loss", "not str"),
        ([1], "returned a int"),
        ([Component("data", "d", print)], "kind 'data'"),
    ],
)
def test_junk_is_refused_and_leaves_nothing_behind(manager, returned, message):
    class Junk:
        @hookimpl
        def kd_register_losses(self):
            return returned

    with pytest.raises(PluginError, match=message):
        manager.register(Junk())
    assert manager.plugins() == []
    manager.register(Mine())
    assert manager.get("loss", "mine")


def test_misspelt_hooks_and_wrong_arguments_are_refused(manager):
    class Misspelt:
        @hookimpl
        def kd_register_loses(self):
            return []

    class Wrong:
        @hookimpl
        def kd_step_finished(self, loss):
            pass

    with pytest.raises(PluginError, match="did you mean 'kd_register_losses'"):
        manager.register(Misspelt())
    with pytest.raises(PluginError, match="loss"):
        manager.register(Wrong())


def test_blocked_plugins_are_not_even_imported(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("kd_classic")]:
        monkeypatch.delitem(sys.modules, module)
    names = {info.name for info in PluginManager(disable=["kd-classic"]).plugins()}
    assert "classic" not in names
    assert "kd_classic.plugin" not in sys.modules
    monkeypatch.setenv("KD_PLUGINS", "classic")
    assert [info.name for info in PluginManager().plugins()] == ["classic"]


def test_components_check_themselves_and_say_what_cannot_be_loaded():
    with pytest.raises(ComponentError, match="unknown kind"):
        Component("los", "x", print)
    with pytest.raises(ComponentError, match="lower case"):
        Component("loss", "My Loss", print)
    with pytest.raises(ComponentError, match=r"cannot load nowhere:X: ModuleNotFoundError"):
        Component("loss", "x", "nowhere:X").load_target()


def test_papers_cite_themselves():
    paper = Paper("Deep Things", "Ada Lovelace, Alan Turing", "NeurIPS", 2020, "2001.00001")
    assert paper.citation == "Ada Lovelace, Alan Turing. Deep Things. NeurIPS, 2020, arXiv:2001.00001."
    assert paper.bibtex.startswith("@inproceedings{lovelace2020deep,")
    many = Paper("Deep Things", "Ada Lovelace et al.", "NeurIPS", 2020)
    assert (many.first_author, "author = {Ada Lovelace and others}" in many.bibtex) == ("Lovelace", True)
