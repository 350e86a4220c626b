"""What `import sra_ds` promises."""

import subprocess
import sys

import pytest

import sra_ds


@pytest.mark.parametrize("name", sra_ds.PUBLIC)
def test_every_public_name_is_there(name):
    assert callable(getattr(sra_ds, name))
    assert name in dir(sra_ds)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = sra_ds.nothing


def test_importing_the_package_imports_no_torch():
    code = "import sra_ds, sra_ds.config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
