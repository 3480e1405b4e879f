"""Optional packages: whether they are there, and how to get them."""

from __future__ import annotations

from importlib.util import find_spec

from training_lens.errors import IntegrationError


def require_packages(extra: str, *packages: str) -> None:
    """Refuse to go on without packages; imports none of them.

    Args:
        extra: of Training Lens, that installs them.
        packages: as they are imported.

    Raises:
        IntegrationError: some are not installed; says how to install them.
    """
    if missing := [package for package in packages if find_spec(package) is None]:
        plural = "s" if len(missing) > 1 else ""
        raise IntegrationError(
            f"needs the package{plural} {' and '.join(missing)}. Install: pip install 'training-lens[{extra}]'."
        )
