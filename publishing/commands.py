"""`dsvl push`."""

import argparse


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl push` to the command's parser."""
    parser = commands.add_parser("push", help="publish a checkpoint directory on the Hub")
    parser.add_argument("directory", metavar="DIR", help="checkpoint directory that dsvl compose, train or merge wrote")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    parser.add_argument("--revision", help="branch; created if it does not exist (default main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry-run", action="store_true", help="run all checks and list the files without uploading")
    parser.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> None:
    from .push import check_directory, describe, push_directory

    if arguments.dry_run:
        print(describe(check_directory(arguments.directory)))
        print(f"All checks passed; nothing was uploaded to {arguments.repo_id}.")
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
