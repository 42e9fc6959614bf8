"""`dsvl push`."""

import argparse


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl push` to the command's parser."""
    parser = commands.add_parser("push", help="a checkpoint directory -> a repository on the Hub")
    parser.add_argument("directory", metavar="DIR", help="what dsvl compose, train or merge has written")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    parser.add_argument("--revision", help="a branch, made if it is not there (default main)")
    parser.add_argument("--create-pr", action="store_true", help="propose the commit as a pull request")
    parser.add_argument("--dry-run", action="store_true", help="make all checks, list the files, upload nothing")
    parser.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> None:
    from .push import check_directory, describe, push_directory

    if arguments.dry_run:
        print(describe(check_directory(arguments.directory)))
        print(f"It opens in a process of its own; nothing was uploaded to {arguments.repo_id}.")
        return
    commit = push_directory(
        arguments.directory,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
    )
    print(commit.pr_url or commit.commit_url)
    print(f'from_pretrained("{arguments.repo_id}", revision="{commit.oid}", trust_remote_code=True)')
