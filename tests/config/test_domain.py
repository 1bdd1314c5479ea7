# SPDX-License-Identifier: GPL-2.0-only
"""xl.cfg to DomainConfig and to libxl's JSON; expected outputs were recorded from xl 4.17 (`xl -N create`)."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyxen.errors import ConfigError
from pyxen.toolstack.config import (
    FEATURES,
    DomainConfig,
    HostCpus,
    Running,
    check_creatable,
    check_name,
    domain_0_json,
    dumps,
    parse,
    parse_cpu_list,
    to_json,
    unsupported,
)
from pyxen.toolstack.config.options import OPTIONS

UUID = "11111111-2222-3333-4444-555555555501"
HOST = HostCpus(8, ((0, 1, 2, 3), (4, 5, 6, 7)))
BASE = f'name="x"\nkernel="/k"\nuuid="{UUID}"\n'

# The basic file without disks and vifs, as xl prints it.
BASIC_CFG = f"""\
name = "pv1"
type = "pv"
uuid = "{UUID}"
kernel = "/boot/vmlinuz"
ramdisk = "/boot/initrd"
extra = "console=hvc0 ro"
root = "/dev/xvda1"
memory = 512
maxmem = 1024
vcpus = 2
maxvcpus = 4
on_poweroff = "destroy"
on_reboot = "restart"
on_crash = "coredump-restart"
"""
BASIC_JSON = """\
{
    "c_info": {
        "type": "pv",
        "name": "pv1",
        "uuid": "11111111-2222-3333-4444-555555555501",
        "run_hotplug_scripts": "True"
    },
    "b_info": {
        "max_vcpus": 4,
        "avail_vcpus": [
            0,
            1
        ],
        "max_memkb": 1048576,
        "target_memkb": 524288,
        "sched_params": {

        },
        "claim_mode": "True",
        "kernel": "/boot/vmlinuz",
        "cmdline": "root=/dev/xvda1 console=hvc0 ro",
        "ramdisk": "/boot/initrd",
        "type.pv": {

        },
        "arch_arm": {

        },
        "arch_x86": {

        }
    },
    "on_reboot": "restart",
    "on_crash": "coredump_restart",
    "on_soft_reset": "soft_reset"
}"""


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "F")
    return str(caught.value)


def refusal_to_create(text: str, *features: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_creatable(parse(text, "F"), features)
    return caught.value


def test_dry_run_prints_what_xl_prints() -> None:
    assert dumps(to_json(parse(BASIC_CFG, "F"))) == BASIC_JSON


def test_hvm_and_pvh_shapes() -> None:
    hvm = to_json(parse('name="x"\nbuilder="hvm"', "F"))
    assert hvm["b_info"]["type.hvm"] == {"vga": {}, "vnc": {}, "sdl": {}, "spice": {}, "rdm": {}}  # type: ignore[index,call-overload]
    assert parse('name="x"\ntype="pvh"\nkernel="k"', "F").type == "pvh"


# cfg/02-pvh.cfg of the oracle, without what later versions do.
PVH_CFG = """\
name = "pvh1"
type = "pvh"
uuid = "11111111-2222-3333-4444-555555555502"
kernel = "/boot/vmlinuz"
ramdisk = "/boot/initrd"
cmdline = "root=/dev/xvda console=hvc0"
memory = 256
vcpus = 1
cpus = "0-1,^1"
cpus_soft = "all"
cpu_weight = 512
cap = 50
pool = "Pool-0"
"""


def test_pvh_dry_run_prints_what_xl_prints() -> None:
    assert to_json(parse(PVH_CFG, "F"), host=HOST) == {
        "c_info": {
            "type": "pvh",
            "name": "pvh1",
            "uuid": "11111111-2222-3333-4444-555555555502",
            "pool_name": "Pool-0",
            "run_hotplug_scripts": "True",
        },
        "b_info": {
            "max_vcpus": 1,
            "avail_vcpus": [0],
            "vcpu_hard_affinity": [[0]],
            "vcpu_soft_affinity": [[0, 1, 2, 3, 4, 5, 6, 7]],
            "numa_placement": "False",
            "max_memkb": 262144,
            "target_memkb": 262144,
            "sched_params": {"weight": 512, "cap": 50},
            "claim_mode": "True",
            "kernel": "/boot/vmlinuz",
            "cmdline": "root=/dev/xvda console=hvc0",
            "ramdisk": "/boot/initrd",
            "type.pvh": {},
            "arch_arm": {},
            "arch_x86": {},
        },
        "on_reboot": "restart",
        "on_soft_reset": "soft_reset",
    }


def test_long_list_shape_of_a_running_pvh_domain() -> None:
    """As the oracle's xl-list-l-pvh.json, without its disk and vif."""
    config = parse(BASE + "type='pvh'\nmemory=96\nvcpus=1\nramdisk='r'\ncmdline='c'\non_crash='preserve'", "F")
    document = to_json(config, running=Running(target_memkb=98304, max_memkb=98304, weight=256, cap=0))
    assert document["c_info"]["type"] == "pvh"  # type: ignore[index,call-overload]
    assert list(document["b_info"].items()) == [  # type: ignore[union-attr]
        ("max_vcpus", 1),
        ("avail_vcpus", [0]),
        ("tsc_mode", "native"),
        ("max_memkb", 98304),
        ("target_memkb", 98304),
        ("video_memkb", 0),
        ("sched_params", {"sched": "credit", "weight": 256, "cap": 0}),
        ("claim_mode", "True"),
        ("kernel", "/k"),
        ("cmdline", "c"),
        ("ramdisk", "r"),
        ("type.pvh", {}),
        ("arch_arm", {}),
        ("arch_x86", {"msr_relaxed": "False"}),
    ]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("hap=1\nacpi=1\napic=1\nnestedhvm=0\naltp2m='disabled'\npvshim=0", []),
        ("altp2m='mixed'", ["altp2m"]),
        ("hap=0", ["hap"]),
        ("acpi=0\napic=0", ["acpi", "apic"]),
        ("nestedhvm=1", ["nestedhvm"]),
        ("pvshim=1", ["pvshim"]),
        ("vga='stdvga'\nbios='seabios'\nusb=1\nhpet=1\nviridian=1", []),  # xl reads them for HVM only
        ("vcpus=4\nmaxvcpus=128", []),
        ("pvh=1", ["pvh"]),
    ],
)
def test_options_of_pvh_domains(text: str, names: list[str]) -> None:
    assert unsupported(parse(BASE + "type='pvh'\n" + text, "F"), FEATURES) == names


def test_what_pvh_domains_cannot_have() -> None:
    error = refusal_to_create(BASE + "type='pvh'\nmemory=64\nmaxmem=128", *FEATURES)
    assert "populate-on-demand" in str(error)
    check_creatable(parse(BASE + "type='pv'\nmemory=64\nmaxmem=128", "F"), FEATURES)
    assert "at most 128 vCPUs" in str(refusal_to_create(BASE + "type='pvh'\nmemory=64\nvcpus=129", *FEATURES))
    assert "at most 128 vCPUs" in str(refusal_to_create(BASE + "memory=64\nmaxvcpus=129", *FEATURES))
    assert 'type = "pvh"' in (refusal_to_create(BASE + "type='hvm'\nmemory=64", *FEATURES).hint or "")
    assert refusal(BASE + "type='pvh'\nbuilder='generic'") == 'Contradicting "builder" and "type" options specified.'


def test_long_list_shape_of_a_running_domain() -> None:
    config = parse(BASE + "memory=96\nvcpus=1\ncmdline='a=\"b\" é\\t'\non_crash='preserve'", "F")
    document = to_json(config, running=Running(target_memkb=98304, max_memkb=98304, weight=256, cap=0))
    assert document == {
        "c_info": {"type": "pv", "name": "x", "domid": 4294967295, "uuid": UUID, "run_hotplug_scripts": "True"},
        "b_info": {
            "max_vcpus": 1,
            "avail_vcpus": [0],
            "max_memkb": 98304,
            "target_memkb": 98304,
            "video_memkb": 0,
            "sched_params": {"sched": "credit", "weight": 256, "cap": 0},
            "claim_mode": "True",
            "kernel": "/k",
            "cmdline": 'a="b" é\t',
            "type.pv": {},
            "arch_arm": {},
            "arch_x86": {"msr_relaxed": "False"},
        },
        "on_reboot": "restart",
        "on_crash": "preserve",
        "on_soft_reset": "soft_reset",
    }
    assert list(document["b_info"])[-3:] == ["type.pv", "arch_arm", "arch_x86"]  # type: ignore[arg-type]
    assert '"cmdline": "a=\\"b\\" é\\t"' in dumps(document)
    assert json.loads(dumps([document, domain_0_json(1, 2), [], {}])) == [document, domain_0_json(1, 2), [], {}]


def test_actions_that_are_destroy_are_left_out() -> None:
    text = "".join(f'on_{event}="destroy"\n' for event in ("poweroff", "reboot", "watchdog", "crash", "soft_reset"))
    assert not [key for key in to_json(parse(BASE + text, "F")) if key.startswith("on_")]
    assert to_json(parse(BASE + 'on_reboot="rename-restart"', "F"))["on_reboot"] == "restart_rename"


def test_config_is_frozen() -> None:
    config = parse(BASE, "F")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "y"  # type: ignore[misc]


def test_defaults_are_libxl_defaults() -> None:
    config = parse('name="x"\nkernel="/k"', "F")
    assert (config.type, config.memory_mb, config.maxmem_mb, config.vcpus, config.max_vcpus) == ("pv", 32, 32, 1, 1)
    assert (config.cpu_weight, config.cap, config.cmdline, config.pv_mode) == (256, 0, None, None)
    assert (config.on_poweroff, config.on_reboot, config.on_crash) == ("destroy", "restart", "destroy")
    assert config.uuid != parse('name="x"\nkernel="/k"', "F").uuid
    assert parse(BASE + "maxmem=64", "F").memory_mb == 64


@pytest.mark.parametrize(
    ("text", "cmdline", "warned"),
    [
        ('extra="b"', "b", False),
        ('root="b"', "root=b", False),
        ('root="b"\nextra="c d"', "root=b c d", False),
        ('root=""\nextra=""', "root= ", False),
        ('cmdline="a"', "a", False),
        ('cmdline="a"\nextra="c"', "a", True),
        ('cmdline=""\nroot="c"', "", True),
    ],
)
def test_command_line_is_merged_as_xl_does(text: str, cmdline: str, warned: bool) -> None:
    config = parse(BASE + text, "F")
    assert config.cmdline == cmdline
    assert config.warnings == (("Warning: ignoring root= and extra= in favour of cmdline=",) if warned else ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('kernel="/k"', "Domain name must be specified."),
        ('name="x"', "Neither kernel nor bootloader specified"),
        ('name="x"\ntype="foo"', "Invalid domain type foo."),
        ('name="x"\nbuilder="linux"', "Invalid domain type linux."),
        ('name="x"\ntype="pv"\nbuilder="hvm"', 'Contradicting "builder" and "type" options specified.'),
        (BASE + 'uuid="abc"', "Failed to parse UUID: abc"),
        (BASE + 'on_crash="explode"', 'Unknown on_crash action "explode" specified'),
        (BASE + "vcpus=3\nmaxvcpus=2", "xl: maxvcpus < vcpus"),
        (BASE + 'vcpus="-1"', "Unable to allocate cpumap"),
        (BASE + "vcpus=1000000000", "Unable to allocate cpumap"),
        (BASE + 'cpus="a"', "Invalid pcpu range: a."),
        (BASE + 'cpus="^all"', 'Can\'t combine "^" and "all".'),
        (BASE + 'cpus_soft=["0","x"]', "Invalid pcpu range: x."),
        (BASE + 'pv_mode="quick"', 'Unknown pv_mode "quick" specified'),
    ],
)
def test_refused_with_xls_words(text: str, message: str) -> None:
    assert refusal(text) == message


def test_extra_assignments_win_and_count_lines_as_xl() -> None:
    config = parse('name="x"\nkernel="/k"', "F", ["memory=5;vcpus=2", 'name="z"'])
    assert (config.name, config.memory_mb, config.vcpus) == ("z", 5, 2)
    assert refusal_line('name="x"\nkernel="/k"\n', ["memory=5", "name=z"]).startswith(
        "F:5: config parsing error near `z'"
    )
    # The added newline also ends a comment on the last line.
    assert parse('name="x"\nkernel="/k"\n#foo', "F", ["memory=5"]).memory_mb == 5


def refusal_line(text: str, extra: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "F", extra)
    return str(caught.value)


def test_unknown_option_is_warned_of_and_kept() -> None:
    config = parse(BASE + 'unknown_key = "zzz"', "F")
    assert config.warnings == ("F:4: warning: unknown parameter `unknown_key' ignored",)
    assert config.settings.value("unknown_key") == "zzz"
    check_creatable(config)


def test_bad_number_is_warned_of_and_ignored() -> None:
    config = parse(BASE + 'vcpus=0\nmemory="lots"', "F")
    assert config.warnings == ("F:5: warning: parameter `memory' is not a valid number",)
    assert "max_vcpus" not in dumps(to_json(config))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("disk=[]\nvif=[]\nvnc=0\nbootloader=''", []),
        ('vif=[""]\ndisk=["a,raw,xvda,w"]', ["vif", "disk"]),
        ("hap=1\nvga='stdvga'\nacpi=1", []),
        ("claim_mode=0\nnomigrate=1\ntsc_mode='default'", []),
        ("tsc_mode='always_emulate'", ["tsc_mode"]),
        ("cpus='0'", ["cpus"]),
        ("pool='Pool-0'", []),
        ("pool='fast'", ["pool"]),
        ("type='pvh'", ["type"]),
        ("type='hvm'\nvga='stdvga'", ["type", "vga"]),
        ("pvh=1", ["pvh"]),
    ],
)
def test_options_of_later_versions_are_named(text: str, names: list[str]) -> None:
    assert unsupported(parse(BASE + text, "F")) == names


def test_host_features_widen_what_can_be_made() -> None:
    config = parse(BASE + "vcpus=2\ncpus='0'\npool='p'", "F")
    assert unsupported(config, {"affinity", "pool"}) == []
    assert unsupported(parse(BASE + "type='pvh'", "F"), {"pvh"}) == []
    assert unsupported(parse(BASE + "pvh=1", "F"), {"pvh"}) == ["pvh"]


def test_refusal_names_the_option_and_what_to_do() -> None:
    error = refusal_to_create(BASE + 'vif=[""]\nbootloader="pygrub"')
    assert str(error) == "option `vif' is not supported by this version of pyxen"
    assert error.hint == "remove it and bootloader from the configuration"
    assert (
        str(refusal_to_create(BASE + "type='hvm'"))
        == 'option `type = "hvm"\' is not supported by this version of pyxen'
    )
    assert 'type = "pvh"' in (refusal_to_create(BASE + "pvh=1").hint or "")


@pytest.mark.parametrize(
    "text",
    [
        "memory=0",
        'memory="-5"',
        "memory=64\nmaxmem=32",
        "memory=99999999999999",
        "cpu_weight=0",
        "cpu_weight=70000",
        'cap="-1"',
    ]
    + ["cap=101", "vcpus=0", 'name=""', 'name="a/b"', 'name="."', 'name="7"', 'name="a\\nb"', f'name="{"n" * 256}"'],
)
def test_absurd_values_are_refused_at_creation(text: str) -> None:
    assert "\n" not in str(refusal_to_create(BASE + text))


def test_names_people_use_are_fine() -> None:
    for name in ("debian", "h-0.x", "Gäst 1", "a" * 255):
        check_name(name)
    with pytest.raises(ConfigError, match="not UTF-8"):
        check_name("a\udc80")


def test_bytes_that_are_not_utf8_travel_through() -> None:
    config = parse((BASE.encode() + b'cmdline="a\xff"').decode(errors="surrogateescape"), "F")
    assert (config.cmdline or "").encode(errors="surrogateescape") == b"a\xff"
    with pytest.raises(ConfigError, match="not text"):
        parse(BASE + 'cmdline="\ud800"', "F")



@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("all", range(8)),
        ("0-3,5,^1", (0, 2, 3, 5)),
        ("all,^7", range(7)),
        ("node:1", (4, 5, 6, 7)),
        ("1,node:1,^6", (1, 4, 5, 7)),
        ("nodes:0-1,^node:0", (4, 5, 6, 7)),
        ("all,^node:1", (0, 1, 2, 3)),
        ("0,,1", (0, 1)),
        ("6-99", (6, 7)),
        ("node:5", ()),
        ("", ()),
    ],
)
def test_cpu_lists(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text).resolve(HOST) == tuple(cpus)


@pytest.mark.parametrize("text", ["1-0", " 0", "cpu:1", "none", "0-", "0x1", "-3", "0-3-5", "^", "node:all"])
def test_bad_cpu_lists(text: str) -> None:
    with pytest.raises(ConfigError, match="Invalid pcpu range"):
        parse_cpu_list(text)


def test_affinity_of_each_vcpu() -> None:
    shared, each = parse(BASE + "cpus='0-1'", "F").cpus, parse(BASE + "cpus=['1','all']", "F").cpus
    assert shared is not None and each is not None
    assert shared.resolve(2, HOST) == [(0, 1), (0, 1)]
    assert each.resolve(3, HOST) == [(1,), tuple(range(8))]
    assert each.resolve(1, HOST) == [(1,)]
    nowhere = parse(BASE + "cpus='^0'", "F").cpus
    assert nowhere is not None
    with pytest.raises(ConfigError, match="vcpu hard affinity map is empty"):
        nowhere.resolve(1, HOST)


def test_affinity_in_json() -> None:
    config = parse(BASE + "vcpus=2\ncpus='0-1,^1'\ncpus_soft='all'", "F")
    info = to_json(config)["b_info"]
    assert isinstance(info, dict)
    assert info["vcpu_hard_affinity"] == [[0], [0]]
    assert "vcpu_soft_affinity" not in info
    info = to_json(config, host=HostCpus(2))["b_info"]
    assert isinstance(info, dict)
    assert info["vcpu_soft_affinity"] == [[0, 1], [0, 1]]
    assert info["numa_placement"] == "False"


VALUES = st.one_of(
    st.text(max_size=8).map(lambda t: '"' + t.replace('"', "").replace("\n", "") + '"'),
    st.integers(0, 1 << 70).map(str),
    st.sampled_from(
        ['"all"', "[]", '["0",[1]]', '"pv"', '"hvm"', "'exact'", "'restart'", "'-5'", "[1", '"0-999999999,^3"', "node"]
    ),
)
LINES = st.tuples(st.sampled_from(sorted(OPTIONS)), st.sampled_from(["=", "+="]), VALUES).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(LINES, max_size=8), st.booleans())
def test_any_option_with_any_value_is_read_or_refused(lines: list[str], base: bool) -> None:
    try:
        config = parse((BASE if base else "") + "\n".join(lines) + "\n", "F")
        assert isinstance(config, DomainConfig)
        text = dumps(to_json(config))
        assert json.loads(text)["c_info"]["name"] == config.name
        check_creatable(config)
    except ConfigError as error:
        assert str(error)
