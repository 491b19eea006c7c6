"""Network devices, on what every machine has: loopback, and no device of another name."""

import pytest

from bulkvpnd.host import device


@pytest.mark.parametrize("kind", device.KINDS)
def test_a_setting_is_read_and_written_as_it_was(kind):
    setting = device.KINDS[kind]
    assert setting.read("lo")
    with pytest.raises(OSError, match="No such device|not supported"):
        setting.read("frobnicate0")
    with pytest.raises(OSError, match="No such device|not supported"):
        setting.write("frobnicate0", "1500")


@pytest.mark.parametrize("value", ["", "many", "-1", "1.5", "1 2", "²", "9" * 10, "9" * 5000])
def test_what_is_no_number_is_no_setting(value):
    with pytest.raises(OSError, match="Invalid argument"):
        device.KINDS["mtu"].write("lo", value)


def test_a_feature_that_no_kernel_has():
    with pytest.raises(OSError, match="no such feature"):
        device.Feature("frobnicate").read("lo")


def test_numeric_hosts_resolve_to_themselves_once():
    pairs = [("192.0.2.1", 7443), ("192.0.2.1", 443), ("2001:db8::1", 7443), ("x" * 70 + ".invalid", 7443)]
    assert device.resolve(pairs) == ["192.0.2.1", "2001:db8::1"]


def test_loopback_leads_nowhere():
    assert device.towards(["127.0.0.1", "::1"]) == []
