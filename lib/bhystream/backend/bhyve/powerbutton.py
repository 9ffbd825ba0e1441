"""The power button of a restored guest: what SIGTERM means to its bhyve.

bhyve takes SIGTERM for a press of the power button once the guest has switched
ACPI on, and for its own end before.  The registers behind that are bhyve's own,
and no snapshot has them: a restored bhyve believes that ACPI is off.  So `vm
stop`, and the shutdown of the host, would end a guest that has moved as a power
cut does.  The guest cannot repair that, because it switches ACPI on only once.

bhysend sees at the source whether bhyve ignores SIGTERM, and says so in the
HOST section.  bhyrecv lets the restored bhyve act as if the guest had done again
what operating systems do:

    PM1 enable   the power button and the global lock raise ACPI's interrupt
    SMI_CMD      BHYVE_ACPI_ENABLE: ACPI is on, and SIGTERM presses the button

SMI_CMD comes last: if only a part is done, SIGTERM ends bhyve as before.  bhyve does
not tell what the guest has enabled, and knows one more event, the clock chip's,
which bhyve never raises.  FreeBSD, Linux and Windows enable the power button.

If the button was pressed at the source, and the guest has not served that when its
state is saved, ACPI's interrupt stays asserted in the restored guest: bhyve there
knows nothing of the press, and never takes the interrupt back.

Source: usr.sbin/bhyve/amd64/pm.c, smi_cmd_handler(), pm1_enable_handler(),
power_button_handler(), FreeBSD 15.1; acpi.h there.
"""

from __future__ import annotations

from bhystream.backend.bhyve.host import PortWrite

_SMI_CMD, _ACPI_ENABLE = 0xB2, 0xA0
_PM1_ENABLE, _PWRBTN_EN, _GBL_EN = 0x402, 0x0100, 0x0020

CONNECT = (
    PortWrite(_PM1_ENABLE, 2, _PWRBTN_EN | _GBL_EN),
    PortWrite(_SMI_CMD, 1, _ACPI_ENABLE),
)
"""What connects the button of a bhyve that was just made."""

LOST = (
    "its power button is not connected, so SIGTERM and vm stop end it as a power cut does: shut it"
    " down from inside"
)
