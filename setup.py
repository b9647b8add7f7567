"""pyproject.toml says everything but this: a wheel that carries the plugin library is for one platform, any Python."""

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel

LIBRARIES = Path(__file__).parent / "instantrt" / "plugins" / "lib"


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        return any(LIBRARIES.glob("*.so"))


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(distclass=Package, cmdclass={"bdist_wheel": Wheel})
