"""Whether the files of this package are those of one installation."""

from __future__ import annotations

from pathlib import Path

# How to get a native library that fits this machine and this torch.
BUILD = (
    "run `pip install scikit-build-core ninja cmake`, then `pip install --no-build-isolation .` in "
    "fastquant's source directory, with the torch installed that will be used"
)


def require_own_files(package: Path) -> None:
    """Raise an error if another project's package of the same name lies in the same folder.

    The project that is called fastquant on PyPI is one for backtesting of trading strategies.
    Installed together, each of the two overwrites files of the other.
    """
    if (package / "backtest").is_dir():
        raise ImportError(
            f"{package} holds files of two projects: of torch-fastquant, whose package is called "
            "fastquant, and of the trading library called fastquant on PyPI. They cannot be "
            "installed together: run `pip uninstall fastquant torch-fastquant`, then install "
            "torch-fastquant again, or use two environments"
        )
