variable "name" {
  description = "Beginning of the names of policies and roles, for example agent-dr-support-agents."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9+=,.@_-]{1,40}$", var.name))
    error_message = "name must be 1 to 40 letters, digits and +=,.@_- (IAM's rule, with room for what is added)."
  }
}

variable "partition" {
  description = "AWS partition: aws, aws-cn or aws-us-gov."
  type        = string
  default     = "aws"

  validation {
    condition     = contains(["aws", "aws-cn", "aws-us-gov"], var.partition)
    error_message = "partition must be aws, aws-cn or aws-us-gov."
  }
}

variable "account_id" {
  description = "AWS account of the tables: the controllers' setting aws.account_id."
  type        = string

  validation {
    condition     = can(regex("^[0-9]{12}$", var.account_id))
    error_message = "account_id must be twelve digits."
  }
}

variable "group" {
  description = "Name of the fleet: the controllers' setting group."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.group))
    error_message = "group must be 1 to 63 lower-case letters, digits and inner hyphens."
  }
}

variable "object_prefix" {
  description = "Path with which all object keys begin: the controllers' setting stream.prefix."
  type        = string
  default     = "dr"

  validation {
    condition     = can(regex("^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$", var.object_prefix)) && !can(regex("(^|/)\\.\\.?(/|$)", var.object_prefix))
    error_message = "object_prefix must be a path like dr or team/dr, without . and .. parts."
  }
}

variable "regions" {
  description = "Bucket, table and AWS region of each region of the group, by the group's own name for it."
  type = map(object({
    aws_region = string
    bucket     = string
    table      = string
  }))

  validation {
    condition     = length(var.regions) >= 2
    error_message = "regions must hold at least two: with one there is nowhere to go."
  }

  validation {
    condition     = alltrue([for region in var.regions : can(regex("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", region.bucket))])
    error_message = "every bucket must be the bucket's name alone: 3 to 63 lower-case letters, digits, dots and hyphens."
  }

  validation {
    condition     = alltrue([for region in var.regions : can(regex("^[A-Za-z0-9_.-]{3,255}$", region.table))])
    error_message = "every table must be the table's name alone: 3 to 255 letters, digits, '_', '.' and '-'."
  }

  validation {
    condition     = alltrue([for region in var.regions : can(regex("^[a-z0-9-]{1,63}$", region.aws_region))])
    error_message = "every aws_region must be the name of an AWS region, for example eu-west-1."
  }
}

variable "zone_id" {
  description = "Hosted zone of the traffic record, without /hostedzone/: the controllers' setting traffic.zone_id."
  type        = string

  validation {
    condition     = can(regex("^[A-Z0-9]{1,32}$", var.zone_id))
    error_message = "zone_id must be 1 to 32 capital letters and digits, without /hostedzone/."
  }
}

variable "dns_name" {
  description = "Name that clients resolve: the controllers' setting traffic.name."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)+\\.?$", var.dns_name))
    error_message = "dns_name must be a full DNS name like agents.dr.example.com, without wildcards: * would match every record."
  }
}

variable "kms_key_arns" {
  description = "KMS keys of the regions (settings regions.NAME.kms_key and former_kms_keys) by ARN, for sealed objects; empty for none."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for arn in var.kms_key_arns : can(regex("^arn:[a-z-]+:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+$", arn))])
    error_message = "every kms_key_arns must be the ARN of a key: IAM does not follow aliases."
  }
}

variable "environment_tag" {
  description = "Key of the tag whose value production keeps drills away."
  type        = string
  default     = "agent-dr-environment"

  validation {
    condition     = can(regex("^[A-Za-z0-9+=._:/@-]{1,128}$", var.environment_tag))
    error_message = "environment_tag must be 1 to 128 letters, digits and +=._:/@-."
  }
}

variable "controller_trust_policy" {
  description = "JSON: who may be a controller (instance profile, task, or the OIDC provider of a Kubernetes cluster). Empty: no role, only policies."
  type        = string
  default     = ""

  validation {
    condition     = var.controller_trust_policy == "" || can(jsondecode(var.controller_trust_policy).Statement)
    error_message = "controller_trust_policy must be a policy document in JSON, or empty."
  }
}

variable "drills_trust_policy" {
  description = "JSON: who may run restore drills. Empty: no role, only the policy."
  type        = string
  default     = ""

  validation {
    condition     = var.drills_trust_policy == "" || can(jsondecode(var.drills_trust_policy).Statement)
    error_message = "drills_trust_policy must be a policy document in JSON, or empty."
  }
}

variable "permissions_boundary_arn" {
  description = "Permissions boundary of the roles; null for none."
  type        = string
  default     = null

  validation {
    condition     = var.permissions_boundary_arn == null || can(regex("^arn:[a-z-]+:iam::[0-9]{12}:policy/.+$", var.permissions_boundary_arn))
    error_message = "permissions_boundary_arn must be the ARN of a policy, or null."
  }
}

variable "tags" {
  description = "Tags of policies and roles."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for key in keys(var.tags) : !startswith(key, "aws:")])
    error_message = "tags may not begin with aws:, which AWS keeps for itself."
  }
}
