"""Builds the package. Everything it declares comes from `settings.ini`, the one place where dependencies are written."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def extra(name: str) -> list[str]:
    "The requirements of one extra, as `settings.ini` lists them."
    return cfg.get(f"{name}_requirements", "").split()


extras = {name: extra(name) for name in ("hub", "scale", "eval", "data")}
extras["dev"] = extra("dev") + extras["eval"] + extras["data"]  # the tests try these two
readme = here / "README.md"
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_name"], f"{cfg['lib_name']}.*"]),
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split("\n")},
    zip_safe=False,
)
