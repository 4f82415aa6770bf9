-- Two databases, not one: Optuna and MLflow both keep their schema's version in a table named alembic_version.
CREATE DATABASE optuna;
CREATE DATABASE mlflow;
