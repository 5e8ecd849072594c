locals {
  bucket_arns = [for name, region in var.regions : "arn:${var.partition}:s3:::${region.bucket}"]
  object_arns = [for arn in local.bucket_arns : "${arn}/${var.object_prefix}/${var.group}/*"]
  table_arns  = [for name, region in var.regions : "arn:${var.partition}:dynamodb:${region.aws_region}:${var.account_id}:table/${region.table}"]
  dns_name    = lower(trimsuffix(var.dns_name, "."))

  copies = {
    bucket_arns     = local.bucket_arns
    object_arns     = local.object_arns
    table_arns      = local.table_arns
    list_prefixes   = ["${var.object_prefix}/${var.group}/*"]
    leading_keys    = ["${var.group}#*"]
    all_arns        = concat(local.bucket_arns, local.object_arns, local.table_arns)
    environment_tag = var.environment_tag
  }

  seals = { key_arns = var.kms_key_arns, group = var.group }

  policies = merge({
    streaming = templatefile("${path.module}/policies/streaming.json.tftpl", local.copies)
    promotion = templatefile("${path.module}/policies/promotion.json.tftpl", {
      zone_arn     = "arn:${var.partition}:route53:::hostedzone/${var.zone_id}"
      change_arn   = "arn:${var.partition}:route53:::change/*"
      record_names = [local.dns_name, "_dr-epoch.${local.dns_name}"]
    })
    drills = templatefile("${path.module}/policies/drills.json.tftpl", local.copies)
    }, length(var.kms_key_arns) == 0 ? {} : {
    sealing   = templatefile("${path.module}/policies/sealing.json.tftpl", local.seals)
    unsealing = templatefile("${path.module}/policies/unsealing.json.tftpl", local.seals)
  })

  roles = {
    for name, role in {
      controller = { trust = var.controller_trust_policy, policies = ["streaming", "promotion", "sealing"] }
      drills     = { trust = var.drills_trust_policy, policies = ["drills", "unsealing"] }
    } : name => role if role.trust != ""
  }

  attachments = merge([
    for name, role in local.roles : {
      for policy in role.policies : "${name}-${policy}" => { role = name, policy = policy } if contains(keys(local.policies), policy)
    }
  ]...)
}

resource "aws_iam_policy" "this" {
  for_each = local.policies

  name   = "${var.name}-${each.key}"
  policy = each.value
  tags   = var.tags
}

resource "aws_iam_role" "this" {
  for_each = local.roles

  name                 = "${var.name}-${each.key}"
  assume_role_policy   = each.value.trust
  permissions_boundary = var.permissions_boundary_arn
  tags                 = var.tags
}

resource "aws_iam_role_policy_attachment" "this" {
  for_each = local.attachments

  role       = aws_iam_role.this[each.value.role].name
  policy_arn = aws_iam_policy.this[each.value.policy].arn
}
