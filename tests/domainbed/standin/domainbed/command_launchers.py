import subprocess


def local_launcher(commands: list[str]) -> None:
    for command in commands:
        subprocess.call(command, shell=True)


def dummy_launcher(commands: list[str]) -> None:
    for command in commands:
        print(f"Dummy launcher: {command}")


REGISTRY = {"local": local_launcher, "dummy": dummy_launcher}
