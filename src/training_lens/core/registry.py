"""The known collectors and analyzers: built-in ones, and those of users."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import ClassVar, Generic, TypeVar

from training_lens.core.collector import DataCollector
from training_lens.core.recording import DataAnalyzer
from training_lens.errors import ConfigurationError
from training_lens.utils.formatting import did_you_mean
from training_lens.utils.logging import get_logger

logger = get_logger(__name__)
C = TypeVar("C", bound="type[DataCollector] | type[DataAnalyzer]")
T = TypeVar("T")


class _Registry(Generic[T]):
    """Classes by their `name`. Users add theirs by the decorator `register`, or by an entry point of their package.

    The built-in ones are in a higher layer, so they are imported by their package's name, too.
    """

    group: ClassVar[str]
    built_in: ClassVar[str]
    _classes: ClassVar[dict[str, type]]
    _is_loaded: ClassVar[bool]

    @classmethod
    def register(cls, new: C) -> C:
        """Decorator: register a class under its `name`.

        Raises:
            ConfigurationError: another class has the name.
        """
        known = cls._classes.get(new.name)
        if known is not None and known.__qualname__ != new.__qualname__:
            raise ConfigurationError(
                f"{cls.__name__}: '{new.name}' is {known.__module__}.{known.__qualname__} already. "
                f"Give {new.__module__}.{new.__qualname__} another name."
            )
        cls._classes[new.name] = new
        return new

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All registered names."""
        cls._load_all()
        return tuple(cls._classes)

    @classmethod
    def get(cls, name: str) -> type[T]:
        """The class with a name.

        Raises:
            ConfigurationError: there is none; names the known ones.
        """
        cls._load_all()
        if name not in cls._classes:
            hint = did_you_mean(name, sorted(cls._classes))
            raise ConfigurationError(
                f"{cls.__name__}: there is no '{name}'.{hint} There are: {', '.join(sorted(cls._classes))}. "
                f"A package adds its own by an entry point of the group '{cls.group}'."
            )
        return cls._classes[name]

    @classmethod
    def _load_all(cls) -> None:
        if cls._is_loaded:
            return
        cls._is_loaded = True
        import_module(cls.built_in)
        for point in entry_points(group=cls.group):
            try:
                cls.register(point.load())
            except Exception as error:  # another package's fault must not end the run
                logger.warning("%s of '%s' cannot be used: %s", cls.__name__, point.value, error)


class CollectorRegistry(_Registry[DataCollector]):
    """The collectors; entry points of the group `training_lens.collectors` add to them."""

    group, built_in = "training_lens.collectors", "training_lens.collectors"
    _classes, _is_loaded = {}, False


class AnalyzerRegistry(_Registry[DataAnalyzer]):
    """The analyzers; entry points of the group `training_lens.analyzers` add to them."""

    group, built_in = "training_lens.analyzers", "training_lens.analyzers"
    _classes, _is_loaded = {}, False
