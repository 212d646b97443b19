"""The documentation site: `make site` builds it from README and docs/ with MkDocs."""
