# SPDX-License-Identifier: GPL-2.0-only
"""``pool=``, ``cpus=`` and ``cpus_soft=`` of a domain that is being created (libxl: ``libxl__domain_make`` moves it to
its pool, ``libxl__build_pre`` pins its vCPUs)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyxen.errors import ConfigError, HostError, XenError
from pyxen.toolstack.config import DomainConfig
from pyxen.toolstack.cpupools import UnknownPool, find_pool, move_domain
from pyxen.toolstack.runtime import host_cpus
from pyxen.toolstack.services import Services, in_thread

if TYPE_CHECKING:
    from pyxen.abi.xen import DomId

async def apply(services: Services, config: DomainConfig, domid: DomId) -> None:
    """Put a domain where its configuration wants it. Its vCPUs exist, and none runs yet.

    Raises ConfigError for a pool that is not there and a CPU list that is empty on this host, HostError when the two do
    not fit together. The domain is the caller's to remove then.
    """
    if config.pool is not None:
        try:
            poolid = await find_pool(services, config.pool)
        except UnknownPool as error:
            raise ConfigError("Illegal pool specified", hint=f"{error}: see xl cpupool-list") from None
        await move_domain(services, poolid, domid)
    if config.cpus is None and config.cpus_soft is None:
        return
    host = host_cpus(services.privcmd)
    hard = [] if config.cpus is None else config.cpus.resolve(config.max_vcpus, host, kind="hard")
    soft = [] if config.cpus_soft is None else config.cpus_soft.resolve(config.max_vcpus, host, kind="soft")

    def pin() -> None:
        for vcpu in range(max(len(hard), len(soft))):
            try:
                services.privcmd.vcpu_set_affinity(
                    domid,
                    vcpu,
                    frozenset(hard[vcpu]) if vcpu < len(hard) else None,
                    frozenset(soft[vcpu]) if vcpu < len(soft) else None,
                )
            except XenError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise HostError(
                    f"setting affinity failed on vcpu `{vcpu}'", hint="none of its cpus= is in the domain's cpupool"
                ) from None

    await in_thread(services.executor, pin)
