"""Every setting, checked before anything starts.

Sources, the later wins: the TOML file (the argument, or the one that ``DR_CONFIG`` names), then the environment
(``DR_ETCD__TTL_SECONDS=10``; lists are JSON), then overrides given by the caller. Relative paths in the file are relative
to the file.

``model`` has the settings, ``values`` the rules on one value, ``rules`` those between values, ``tls`` looks into certificates,
``loading`` reads and tells everything that is wrong at once, ``reference`` describes and fingerprints.
"""

from controller.settings.loading import CONFIG_VARIABLE, load_settings
from controller.settings.model import (
    ENV_PREFIX,
    ApiSettings,
    ApprovalSettings,
    AwsSettings,
    DnsSettings,
    EtcdSettings,
    FleetSettings,
    NotifySettings,
    PromotionSettings,
    RegionSettings,
    RpoSettings,
    Settings,
    StreamSettings,
    TrafficSettings,
)
from controller.settings.reference import SettingDoc, describe, fingerprint
from controller.settings.rules import controller_name, tls_files

__all__ = [
    "CONFIG_VARIABLE",
    "ENV_PREFIX",
    "ApiSettings",
    "ApprovalSettings",
    "AwsSettings",
    "DnsSettings",
    "EtcdSettings",
    "FleetSettings",
    "NotifySettings",
    "PromotionSettings",
    "RegionSettings",
    "RpoSettings",
    "SettingDoc",
    "Settings",
    "StreamSettings",
    "TrafficSettings",
    "controller_name",
    "describe",
    "fingerprint",
    "load_settings",
    "tls_files",
]
