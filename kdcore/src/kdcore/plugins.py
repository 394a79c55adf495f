"""Finding, isolating and asking plugins.

A broken plugin breaks nothing else: whatever goes wrong while it is imported or asked is kept as that plugin's
error, shown by `kd list` and `kd doctor`, and raised only when a recipe asks for something it may have provided.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pluggy

from kdcore import hookspecs
from kdcore.components import Component, Kind
from kdcore.errors import ComponentError, PluginError, did_you_mean, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PluginInfo:
    """What is known of one plugin: entry-point name, distribution, version, its error if it is broken, and whether it
    imported torch when it was loaded, which makes every command slow."""

    name: str
    distribution: str
    version: str = ""
    error: str | None = None
    components: tuple[Component, ...] = ()
    heavy: bool = False


@dataclass
class PluginManager:
    """Holds the plugins and looks up their components.

    Args:
        only: load only these entry points (names of plugins or distributions). Default: the environment variable
            `KD_PLUGINS`, a comma-separated list; unset means all.
        disable: do not load these. Default: `KD_DISABLE_PLUGINS`.
        discover: whether installed plugins are looked for at all; they are, on the first lookup.
    """

    only: Iterable[str] | None = None
    disable: Iterable[str] | None = None
    discover: bool = True
    _infos: dict[str, PluginInfo] = field(default_factory=dict, init=False, repr=False)
    _discovered: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)

    # -- registration ------------------------------------------------------------------------------------------

    def register(self, plugin: object, name: str | None = None) -> None:
        """Register a module, class or instance that implements hooks, as an installed plugin would be.

        Raises:
            PluginError: if it breaks a rule: an unknown hook, wrong arguments, or junk returned.
        """
        name = name or str(getattr(plugin, "__name__", type(plugin).__name__))
        if name in self._infos:
            raise PluginError(f"a plugin named {name!r} is already registered; pass register(..., name=...)")
        self._infos[name] = self._admit(PluginInfo(name, distribution=name), plugin)

    def unregister(self, name: str) -> None:
        """Take a plugin that was registered under this name out again."""
        del self._infos[name]
        if self._pluggy.has_plugin(name):
            self._pluggy.unregister(name=name)

    def plugins(self) -> list[PluginInfo]:
        """All plugins, broken ones included, by name."""
        self._discover()
        return sorted(self._infos.values(), key=lambda info: info.name)

    def _discover(self) -> None:
        if self._discovered or not self.discover:
            return
        self._discovered = True
        only = _names(self.only, "KD_PLUGINS")
        disable = _names(self.disable, "KD_DISABLE_PLUGINS")
        for entry in _entry_points():
            dist = entry.dist
            info = PluginInfo(entry.name, dist.name if dist else entry.name, dist.version if dist else "")
            names = {entry.name, info.distribution}
            if (only and not names & only) or names & disable:
                continue
            key = entry.name if entry.name not in self._infos else f"{info.distribution}:{entry.name}"
            try:
                _check_core_version(dist)
                before = "torch" in sys.modules
                admitted = self._admit(info, entry.load())
                self._infos[key] = replace(admitted, heavy=not before and "torch" in sys.modules)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit at import must not end the program either
                logger.debug("plugin %s failed", entry.name, exc_info=True)
                self._infos[key] = replace(info, error=" ".join(f"{type(error).__name__}: {error}".strip(": ").split()))

    def _admit(self, info: PluginInfo, plugin: object) -> PluginInfo:
        """Register with pluggy, check the hooks, and collect the components; undone if anything is wrong."""
        if isinstance(plugin, type):
            plugin = plugin()
        try:
            if self._pluggy.register(plugin, info.name if not self._pluggy.has_plugin(info.name) else None) is None:
                raise PluginError("its name is blocked")
            for caller in self._pluggy.get_hookcallers(plugin) or ():
                if not caller.has_spec():
                    known = [n for n in dir(hookspecs) if n.startswith("kd_")]
                    raise PluginError(f"unknown hook {caller.name!r}; {did_you_mean(caller.name, known)}")
            return replace(info, components=tuple(self._collect(plugin)))
        except BaseException as error:
            if self._pluggy.is_registered(plugin):
                self._pluggy.unregister(plugin)
            if isinstance(error, pluggy.PluginValidationError):
                raise PluginError(str(error)) from error
            raise

    def _collect(self, plugin: object) -> Iterator[Component]:
        for hook, kind in hookspecs.REGISTRATION.items():
            for impl in getattr(self._pluggy.hook, hook).get_hookimpls():
                if impl.plugin is not plugin:
                    continue
                returned = impl.function()
                if isinstance(returned, str | Component) or not isinstance(returned, Iterable):
                    raise PluginError(f"{hook} must return a list of components, not {type(returned).__name__}")
                for component in returned:
                    if not isinstance(component, Component):
                        raise PluginError(f"{hook} returned a {type(component).__name__}, not a kdcore.Component")
                    if component.kind != kind:
                        raise PluginError(
                            f"{hook} returned {component.name!r} of kind {component.kind!r}, not {kind!r}"
                        )
                    yield component

    # -- lookup ------------------------------------------------------------------------------------------------

    def components(self, kind: Kind | None = None, tag: str | None = None) -> list[tuple[PluginInfo, Component]]:
        """All components with the plugin each comes from, sorted by kind and name."""
        found = [(info, c) for info in self.plugins() for c in info.components
                 if kind in (None, c.kind) and (tag is None or tag in c.tags)]  # fmt: skip
        return sorted(found, key=lambda pair: (pair[1].kind, pair[1].name, pair[0].distribution))

    def get(self, kind: Kind, name: str) -> Component:
        """The component of this kind and name; `distribution:name` names one of several.

        Raises:
            ComponentError: if there is none, or several of one name.
        """
        distribution, _, short = name.rpartition(":")
        found = [(info, c) for info, c in self.components(kind)
                 if c.name == short and distribution in ("", info.distribution)]  # fmt: skip
        if len(found) == 1:
            return found[0][1]
        if found:
            forms = " or ".join(f"'{info.distribution}:{short}'" for info, _ in found)
            raise ComponentError(f"{kind} {name!r} is offered by several plugins: write {forms}")
        names = {c.name for _, c in self.components(kind)}
        broken = [f"{i.name} ({i.distribution}): {i.error}" for i in self.plugins() if i.error]
        hint = f"\nplugins that failed to load and may have provided it: {'; '.join(broken)}" if broken else ""
        near = did_you_mean(short, names, f"known: {kind}s")
        raise ComponentError(f"unknown {kind} {shown(repr(name))}; {near}{hint}")

    # -- events ------------------------------------------------------------------------------------------------

    def notify(self, event: str, **arguments: Any) -> None:
        """Call an observer hook on every plugin. One that raises is reported once and not called again."""
        for impl in reversed(getattr(self._pluggy.hook, event).get_hookimpls()):
            try:
                impl.function(*(arguments[name] for name in impl.argnames))
            except Exception as error:
                logger.warning("plugin %s failed in %s and is ignored from now on: %s: %s",
                               impl.plugin_name, event, type(error).__name__, error)  # fmt: skip
                self._pluggy.unregister(impl.plugin)


def _entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    """The entry points of the group, also where the list of one distribution cannot be read."""
    try:
        yield from importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP)
    except Exception:
        for dist in importlib.metadata.distributions():
            try:
                yield from (e for e in dist.entry_points if e.group == hookspecs.ENTRY_POINT_GROUP)
            except Exception as error:
                logger.warning("%s: its entry_points.txt cannot be read: %s", dist.name, error)


def _names(given: Iterable[str] | None, variable: str) -> set[str]:
    names = os.environ.get(variable, "").split(",") if given is None else given
    return {name.strip() for name in names if name.strip()}


def _check_core_version(dist: importlib.metadata.Distribution | None) -> None:
    """Refuse a plugin whose distribution asks for a kdcore other than the one that is running."""
    wanted = [r for r in (dist.requires or () if dist else ()) if re.match(r"kdcore\b(?![-.\w])", r)]
    if wanted:
        from packaging.requirements import Requirement

        from kdcore import __version__

        requirement = Requirement(wanted[0])
        if not requirement.specifier.contains(__version__, prereleases=True):
            raise PluginError(f"it needs {requirement}, but this is kdcore {__version__}")
