# SPDX-License-Identifier: GPL-2.0-only
"""xl.cfg(5): text to a typed, frozen domain configuration, and that to libxl's JSON.

``parse`` reads (and never refuses an option that only a later version can honour), ``check_creatable`` decides whether
this version can make the domain, ``resolve`` finds the files a configuration names.
"""

from __future__ import annotations

from pyxen.toolstack.config.cpulist import Affinity, CpuList, HostCpus, parse_cpu_list
from pyxen.toolstack.config.domain import (
    ACTIONS,
    FEATURES,
    DomainConfig,
    check_creatable,
    check_name,
    parse,
    unsupported,
)
from pyxen.toolstack.config.libxl_json import Running, domain_0_json, dumps, to_json
from pyxen.toolstack.config.paths import cache_dir, guest_dir, resolve
from pyxen.toolstack.config.settings import Settings
from pyxen.toolstack.config.syntax import ConfigSyntaxError

__all__ = [
    "ACTIONS",
    "FEATURES",
    "Affinity",
    "ConfigSyntaxError",
    "CpuList",
    "DomainConfig",
    "HostCpus",
    "Running",
    "Settings",
    "cache_dir",
    "check_creatable",
    "check_name",
    "domain_0_json",
    "dumps",
    "guest_dir",
    "parse",
    "parse_cpu_list",
    "resolve",
    "to_json",
    "unsupported",
]
