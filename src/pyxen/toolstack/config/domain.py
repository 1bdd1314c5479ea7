# SPDX-License-Identifier: GPL-2.0-only
"""xl.cfg(5) to a typed, frozen :class:`DomainConfig`, in the order and with the words of xl."""

from __future__ import annotations

import re
import uuid as uuid_module
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NoReturn, cast

from pyxen.errors import ConfigError
from pyxen.toolstack.config.cpulist import Affinity, parse_cpu_list
from pyxen.toolstack.config.options import OPTIONS, Handling, asks_for_something
from pyxen.toolstack.config.settings import Settings
from pyxen.toolstack.config.syntax import parse_text

DomainType = Literal["pv", "pvh", "hvm"]
PvMode = Literal["exact", "fast"]
Action = Literal[
    "destroy", "restart", "rename-restart", "preserve", "coredump-destroy", "coredump-restart", "soft-reset"
]

ACTIONS: tuple[Action, ...] = (
    "destroy",
    "restart",
    "rename-restart",
    "preserve",
    "coredump-destroy",
    "coredump-restart",
    "soft-reset",
)

DEFAULT_MEMORY_MB = 32
"""What libxl gives a domain that says nothing (libxl__domain_build_info_setdefault)."""

MAX_VCPUS = 8192
"""Most vCPUs a PV domain can have (MAX_VIRT_CPUS, xen/include/asm-x86/config.h)."""

MAX_CREATABLE_VCPUS = 128
"""Most vCPUs this version creates: HVM_MAX_VCPUS; PV domains have the same limit here."""

FEATURES = frozenset({"pvh", "affinity", "pool"})
"""What :func:`unsupported` calls features and this version has."""

MAX_NAME_BYTES = 255
MAX_MEMORY_MB = (1 << 52) >> 20
DEFAULT_WEIGHT = 256
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_NAME = re.compile(r"[^\0-\x1f\x7f/]+")


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainConfig:
    """One domain as configured.

    ``*_set`` is what the file said (None: nothing), the property without the suffix what libxl makes of it.
    ``settings`` has every option as written, also those that are not typed yet.  ``warnings`` are xl's lines for
    standard error.
    """

    name: str
    type: DomainType
    uuid: str
    """Lower case, with dashes; a fresh random one when the file has none."""
    memory_set: int | None = None
    maxmem_set: int | None = None
    vcpus_set: int | None = None
    maxvcpus_set: int | None = None
    cpus: Affinity | None = None
    cpus_soft: Affinity | None = None
    pool: str | None = None
    weight_set: int | None = None
    cap_set: int | None = None
    kernel: str | None = None
    """As written: see :func:`pyxen.toolstack.config.paths.resolve`."""
    ramdisk: str | None = None
    cmdline: str | None = None
    """``cmdline``, or ``root`` and ``extra`` merged; None when the file has none of them."""
    on_poweroff: Action = "destroy"
    on_reboot: Action = "restart"
    on_watchdog: Action = "destroy"
    on_crash: Action = "destroy"
    on_soft_reset: Action = "soft-reset"
    pv_mode: PvMode | None = None
    """pyxen's own option: the host's default when None."""
    settings: Settings = field(repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def memory_mb(self) -> int:
        """MiB the domain starts with."""
        if self.memory_set is not None:
            return self.memory_set
        return DEFAULT_MEMORY_MB if self.maxmem_set is None else self.maxmem_set

    @property
    def maxmem_mb(self) -> int:
        """MiB the domain may ever have."""
        return self.memory_mb if self.maxmem_set is None else self.maxmem_set

    @property
    def max_vcpus(self) -> int:
        """vCPUs the domain has."""
        return self.maxvcpus_set or self.vcpus_set or 1

    @property
    def vcpus(self) -> int:
        """vCPUs that are online at the start: the first ones."""
        return self.vcpus_set or 1

    @property
    def cpu_weight(self) -> int:
        return DEFAULT_WEIGHT if self.weight_set is None else self.weight_set

    @property
    def cap(self) -> int:
        """Per cent of one CPU; 0 is no limit."""
        return self.cap_set or 0


def parse(text: str, path: str, extra: Iterable[str] = ()) -> DomainConfig:
    """Parse a configuration named ``path`` in messages; ``extra`` are assignments of the command line and win.

    Raises ConfigError (ConfigSyntaxError when the text is none); names of what this version cannot do raise nothing
    here: see :func:`unsupported`.
    """
    extra = list(extra)
    if extra:
        # xl's own way, which also gives the line numbers of messages about them.
        text = text + "\n" + "".join(f"{assignment}\n" for assignment in extra)
    settings = Settings(path, parse_text(text, path))
    return _Reader(settings).read()


class _Reader:
    def __init__(self, settings: Settings) -> None:
        self.s = settings

    def read(self) -> DomainConfig:
        s = self.s
        domain_type = self._type()
        name = s.string("name")
        if name is None:
            raise ConfigError("Domain name must be specified.")
        uuid = s.string("uuid")
        if uuid is None:
            uuid = str(uuid_module.uuid4())
        elif not _UUID.fullmatch(uuid):
            raise ConfigError(f"Failed to parse UUID: {uuid}")
        pool = s.string("pool")
        weight, cap = s.integer("cpu_weight"), s.integer("cap")
        vcpus, maxvcpus = self._vcpus()
        cpus, cpus_soft = self._affinity("cpus"), self._affinity("cpus_soft")
        memory, maxmem = s.integer("memory"), s.integer("maxmem")
        config = DomainConfig(
            name=name,
            type=domain_type,
            uuid=uuid.lower(),
            memory_set=memory,
            maxmem_set=maxmem,
            vcpus_set=vcpus,
            maxvcpus_set=maxvcpus,
            cpus=cpus,
            cpus_soft=cpus_soft,
            pool=pool,
            weight_set=weight,
            cap_set=cap,
            on_poweroff=self._action("on_poweroff", "destroy"),
            on_reboot=self._action("on_reboot", "restart"),
            on_watchdog=self._action("on_watchdog", "destroy"),
            on_crash=self._action("on_crash", "destroy"),
            on_soft_reset=self._action("on_soft_reset", "soft-reset"),
            kernel=s.string("kernel"),
            ramdisk=s.string("ramdisk"),
            cmdline=self._cmdline(),
            pv_mode=self._pv_mode(),
            settings=s,
        )
        if domain_type != "hvm" and config.kernel is None and not s.string("bootloader") and not s.string("firmware"):
            raise ConfigError("Neither kernel nor bootloader specified")
        self._warn_of_unknown()
        object.__setattr__(config, "warnings", s.warnings)
        return config

    def _type(self) -> DomainType:
        chosen: DomainType | None = None
        if (text := self.s.string("type")) is not None:
            if text not in ("pv", "pvh", "hvm"):
                raise ConfigError(f"Invalid domain type {text}.")
            chosen = cast(DomainType, text)
        if (text := self.s.string("builder")) is not None:
            if text not in ("generic", "hvm"):
                raise ConfigError(f"Invalid domain type {text}.")
            built: DomainType = "hvm" if text == "hvm" else "pv"
            if chosen is not None and chosen != built:
                raise ConfigError('Contradicting "builder" and "type" options specified.')
            chosen = built
        return chosen or "pv"

    def _vcpus(self) -> tuple[int | None, int | None]:
        vcpus, maxvcpus = self.s.integer("vcpus"), self.s.integer("maxvcpus")
        if vcpus is not None and not 0 <= vcpus <= MAX_VCPUS:
            raise ConfigError("Unable to allocate cpumap", hint=f"vcpus must be between 1 and {MAX_VCPUS}")
        if maxvcpus is not None and not 0 <= maxvcpus <= MAX_VCPUS:
            raise ConfigError(f"maxvcpus={maxvcpus} is out of range", hint=f"it must be between 1 and {MAX_VCPUS}")
        if vcpus and maxvcpus is not None and maxvcpus < vcpus:
            raise ConfigError("xl: maxvcpus < vcpus")
        return vcpus, maxvcpus

    def _affinity(self, name: str) -> Affinity | None:
        value = self.s.value(name)
        if value is None:
            return None
        if isinstance(value, str):
            return Affinity((parse_cpu_list(value),), per_vcpu=False)
        if not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{name}= must be a string or a list of strings")
        return Affinity(tuple(parse_cpu_list(cast(str, item)) for item in value[:MAX_VCPUS]), per_vcpu=True)

    def _action(self, name: str, default: Action) -> Action:
        text = self.s.string(name)
        if text is None:
            return default
        for action in ACTIONS:
            if text == action:
                return action
        raise ConfigError(f'Unknown {name} action "{text}" specified')

    def _cmdline(self) -> str | None:
        cmdline = self.s.string("cmdline")
        root, extra = self.s.string("root"), self.s.string("extra")
        if cmdline is not None:
            if root is not None or extra is not None:
                self.s.warn(None, "Warning: ignoring root= and extra= in favour of cmdline=")
            return cmdline
        if root is None:
            return extra
        return f"root={root}" if extra is None else f"root={root} {extra}"

    def _pv_mode(self) -> PvMode | None:
        text = self.s.string("pv_mode")
        if text is None:
            return None
        if text not in ("exact", "fast"):
            raise ConfigError(f'Unknown pv_mode "{text}" specified', hint='it is "exact" or "fast"')
        return cast(PvMode, text)

    def _warn_of_unknown(self) -> None:
        for setting in self.s:
            handling = OPTIONS.get(setting.name)
            if handling is None:
                self.s.warn(setting, f"unknown parameter `{setting.name[:80]}' ignored")


def check_name(name: str) -> None:
    """Refuse a domain name that cannot be a xenstore node value and part of a log file's name (ConfigError)."""
    try:
        size_bytes = len(name.encode())
    except UnicodeEncodeError:
        raise ConfigError("invalid domain name: it is not UTF-8") from None
    if not _NAME.fullmatch(name) or size_bytes > MAX_NAME_BYTES or name in (".", ".."):
        raise ConfigError(
            f"invalid domain name {name[:80]!r}",
            hint=f"1 to {MAX_NAME_BYTES} bytes, without '/' and control characters",
        )
    if name.isascii() and name.isdigit():
        raise ConfigError(f"invalid domain name `{name}'", hint="a name of digits only would be taken for a domain id")


def unsupported(config: DomainConfig, features: Iterable[str] = ()) -> list[str]:
    """Names of the options that ask for what this version cannot do yet, in the file's order.

    ``features`` are names of what the host at hand does have beyond the least: "affinity" (cpus=, cpus_soft=),
    "pvh", "hvm", or an option's own name.
    """
    have = set(features)
    names = []
    for setting in config.settings:
        name = setting.name
        handling = OPTIONS.get(name)
        refused = False
        if name in have and name != "pvh":  # the option of that name is 4.6's, the feature its successor
            continue
        if (
            handling is Handling.LATER
            or (handling is Handling.HVM_ONLY and config.type == "hvm")
            or (handling is Handling.TRANSLATED and config.type != "pv")
        ):
            refused = asks_for_something(name, setting.value)
        elif name in ("type", "builder"):
            refused = config.type != "pv" and config.type not in have
        elif name in ("cpus", "cpus_soft"):
            refused = "affinity" not in have
        elif name == "pool":
            refused = config.pool != "Pool-0"
        if refused:
            names.append(name)
    return names


def check_creatable(config: DomainConfig, features: Iterable[str] = ()) -> None:
    """Raise ConfigError unless a domain can be made of ``config``: options of later versions, values out of range."""
    check_name(config.name)
    if names := unsupported(config, features):
        _refuse(config, names)
    if config.kernel is None:
        raise ConfigError("no kernel specified", hint='set kernel = "…"')
    if not 0 < config.memory_mb <= MAX_MEMORY_MB:
        raise ConfigError(f"memory={config.memory_mb} is out of range")
    if not config.memory_mb <= config.maxmem_mb <= MAX_MEMORY_MB:
        raise ConfigError(f"maxmem={config.maxmem_mb} is less than memory={config.memory_mb} or out of range")
    if config.type == "pvh" and config.maxmem_mb > config.memory_mb:
        raise ConfigError(
            f"maxmem={config.maxmem_mb} above memory={config.memory_mb} would need populate-on-demand, which PVH "
            "domains do not have here",
            hint=f"set both to the same value; memory={config.maxmem_mb} can be lowered at run time (xl mem-set)",
        )
    if config.vcpus_set == 0 or config.maxvcpus_set == 0:
        raise ConfigError("a domain needs a vCPU")
    if config.max_vcpus > MAX_CREATABLE_VCPUS:
        raise ConfigError(f"a domain has at most {MAX_CREATABLE_VCPUS} vCPUs, not {config.max_vcpus}")
    if not 1 <= config.cpu_weight <= 65535:
        raise ConfigError(f"cpu_weight={config.cpu_weight} is out of range", hint="1 to 65535")
    if not 0 <= config.cap <= 100 * config.max_vcpus:
        hint = f"0 to {100 * config.max_vcpus} with {config.max_vcpus} vCPUs"
        raise ConfigError(f"cap={config.cap} is out of range", hint=hint)


def _refuse(config: DomainConfig, names: list[str]) -> NoReturn:
    name = names[0]
    value = config.settings.value(name)
    if name == "pvh":
        successor = 'its successor is type = "pvh" (PVH version 2)'
        raise ConfigError("pvh=1 (PVH version 1 of Xen 4.6) is not supported", hint=successor)
    shown = f'{name} = "{value[:80]}"' if isinstance(value, str) else name
    hint = "remove it from the configuration"
    if len(names) > 1:
        hint = f"remove it and {', '.join(names[1:])} from the configuration"
    if name in ("type", "builder"):
        hint = 'this version runs type = "pv" and type = "pvh"'
    raise ConfigError(f"option `{shown}' is not supported by this version of pyxen", hint=hint)
